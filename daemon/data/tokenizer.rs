//! The tokenizer and chat template of one model directory.
//!
//! Files, as Hugging Face lays them out:
//!
//! | file | what is taken from it |
//! |---|---|
//! | `tokenizer.json` (required) | vocabulary, merges, pre-tokenizer, added tokens |
//! | `tokenizer_config.json` | `bos_token` …, `add_bos_token`, `add_eos_token`, inline `chat_template` |
//! | `special_tokens_map.json` | special tokens the former does not name |
//! | `chat_template.jinja`, `additional_chat_templates/tool_use.jinja` | the template; wins over the inline one |
//! | `generation_config.json` | further tokens that end a generation |
//!
//! Which special tokens go around a plain text is what the post-processor of `tokenizer.json` does, as `AutoTokenizer` of
//! transformers 5 has it: `add_bos_token` and `add_eos_token` of the config are ignored where a `tokenizer.json` is. A
//! rendered chat template gets none: it wrote its own.
//!
//! **Control tokens.** The tokenizer turns the text `<|im_end|>` into the token that ends a turn, wherever it stands.
//! In what a template wrote that is right; in what a row of a data set holds it would let the row end its own turn and
//! speak as somebody else. [`ChatTokenizer::control_token_in`] finds such text, and rows that hold it are refused.

use super::template::{ChatTemplate, Date, Rendered, TemplateError};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, PostProcessor, Tokenizer};

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` is not there.
    #[error(
        "{path} is missing: a model directory needs the tokenizer it was trained with \
         (a `tokenizer.model` alone can be converted by loading it with transformers' AutoTokenizer and calling save_pretrained)"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} is not usable: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A conversation was given to a model that has no chat template.
    #[error(
        "this model has no chat template: use rows with `text`, or with `prompt` and `completion` as strings, \
         or put the template of a chat model as chat_template.jinja into the model directory"
    )]
    NoTemplate,
    /// The chat template does not compile, or refused a conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer could not encode a text.
    #[error("the tokenizer cannot encode this text: {0}")]
    Encode(String),
}

/// Tokens with where each stands in the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range of each token; empty for tokens that the tokenizer added.
    pub offsets: Vec<(usize, usize)>,
}

/// Everything needed to turn conversations into tokens of one model directory.
#[derive(Debug)]
pub struct ChatTokenizer {
    /// Without a post-processor: those trim offsets, and the special tokens they add are added by `post` below.
    inner: Tokenizer,
    post: Option<PostProcessorWrapper>,
    tokenizer_hash: [u8; 32],
    /// Named special tokens: `bos_token`, `eos_token`, …
    special: BTreeMap<String, String>,
    template_text: String,
    tool_template_text: Option<String>,
    template: Option<ChatTemplate>,
    tool_template: Option<ChatTemplate>,
    eos_ids: Vec<u32>,
    eos_id: Option<u32>,
    vocab_size: usize,
    control: Control,
    probe: Probe,
}

/// What the template writes around an assistant's turn, learnt once from a conversation of two turns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Probe {
    /// What `add_generation_prompt` appends: the header of an assistant's turn. Empty when the template ignores it.
    pub header: String,
    /// What stands between a user's words and the assistant's turn, generation prompt included.
    pub user_close: String,
    /// Tokens that end an assistant's turn.
    pub closing: Vec<String>,
}

impl ChatTokenizer {
    /// Reads the tokenizer of a model directory.
    pub fn load(model_dir: &Path) -> Result<Self, TokenizerError> {
        let path = model_dir.join("tokenizer.json");
        let bytes = read(&path)?.ok_or_else(|| TokenizerError::Missing { path: path.clone() })?;
        let invalid = |reason: String| TokenizerError::Invalid { path: path.clone(), reason };
        let mut inner = Tokenizer::from_bytes(&bytes).map_err(|e| invalid(e.to_string()))?;
        inner.with_truncation(None).map_err(|e| invalid(e.to_string()))?;
        inner.with_padding(None);

        let config_path = model_dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or(Json::Null);
        let map = read_json(&model_dir.join("special_tokens_map.json"))?.unwrap_or(Json::Null);
        let mut special = BTreeMap::new();
        for name in
            ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
        {
            // A name that the config holds with null is a decision (Qwen has no bos), not a gap.
            let value = config.get(name).or_else(|| map.get(name));
            if let Some(text) = value.and_then(token_text) {
                special.insert(name.to_owned(), text.to_owned());
            }
        }
        add_special_tokens(&mut inner, &special, &config, &map).map_err(&invalid)?;

        let post = inner.get_post_processor().cloned();
        if let Some(post) = &post
            && let Some(token) = serde_json::to_value(post).ok().as_ref().and_then(undefined_special_token)
        {
            return Err(invalid(format!(
                "the post-processor inserts {token:?}, which is not among its special_tokens: add it there"
            )));
        }
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let (template_text, tool_template_text) = templates(model_dir, &config, &config_path)?;
        let globals: Vec<(String, String)> = special.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let compile = |text: &str| {
            if text.is_empty() { Ok(None) } else { ChatTemplate::compile(text, &globals).map(Some) }
        };
        let template = compile(&template_text)?;
        let tool_template = compile(tool_template_text.as_deref().unwrap_or_default())?;

        let eos_id = special.get("eos_token").and_then(|t| inner.token_to_id(t));
        let mut eos_ids = generation_eos(&model_dir.join("generation_config.json"))?;
        eos_ids.extend(eos_id);
        eos_ids.sort_unstable();
        eos_ids.dedup();

        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let mut tokenizer = Self {
            inner,
            post,
            tokenizer_hash: Sha256::digest(&bytes).into(),
            special,
            template_text,
            tool_template_text,
            template,
            tool_template,
            eos_ids,
            eos_id,
            vocab_size,
            control: Control::default(),
            probe: Probe::default(),
        };
        tokenizer.tokenizer_hash = tokenizer.hash_everything();
        tokenizer.probe = tokenizer.learn_probe();
        tokenizer.control = Control::new(
            tokenizer
                .added_tokens()
                .filter(|t| t.special)
                .map(|t| t.content)
                .chain(tokenizer.probe.closing.iter().cloned()),
        );
        Ok(tokenizer)
    }

    /// SHA-256 of the chat template's text, in hex; of the empty text when there is none. A second template for tools
    /// is hashed behind the first.
    pub fn template_hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.template_text);
        if let Some(text) = &self.tool_template_text {
            hash.update(b"\0tool_use\0");
            hash.update(text);
        }
        hex(&hash.finalize())
    }

    /// SHA-256 over everything but the template that can change a token, in hex: `tokenizer.json`, and what the other
    /// files say of special, added and end tokens.
    pub fn tokenizer_hash(&self) -> String {
        hex(&self.tokenizer_hash)
    }

    /// See [`Self::tokenizer_hash`]; until it is called the field holds the hash of `tokenizer.json` alone.
    fn hash_everything(&self) -> [u8; 32] {
        let mut added: Vec<_> = self.inner.get_added_tokens_decoder().into_iter().collect();
        added.sort_unstable_by_key(|(id, _)| *id);
        let mut hash = Sha256::new();
        hash.update(self.tokenizer_hash);
        hash.update(json!({ "special": self.special, "eos": self.eos_ids, "added": added }).to_string());
        hash.finalize().into()
    }

    /// Everything that can change a token: tokenizer, template, special tokens, what goes around a text.
    pub(super) fn identity(&self) -> Json {
        json!({
            "tokenizer": self.tokenizer_hash(),
            "template": self.template_hash(),
            "special": self.special,
            "eos": self.eos_ids,
            "post_processor": self.post,
        })
    }

    /// Whether conversations can be given.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some() || self.tool_template.is_some()
    }

    /// Smallest vocabulary a model needs for this tokenizer: the highest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Tokens that end a generation: those of `generation_config.json` and the tokenizer's `eos_token`. Ascending.
    pub fn eos_ids(&self) -> Vec<u32> {
        self.eos_ids.clone()
    }

    /// The tokenizer's own end token, which ends a plain text: its id and its text.
    pub(super) fn eos(&self) -> Option<(u32, &str)> {
        self.eos_id.zip(self.special.get("eos_token").map(String::as_str))
    }

    /// Tokens of a conversation up to the point where the assistant speaks next.
    pub fn encode_prompt(&self, messages: &[Json], tools: Option<&Json>) -> Result<Vec<u32>, TokenizerError> {
        let rendered = self.template(tools)?.render(messages, tools, true, Date::Today)?;
        Ok(self.encode(&rendered.text, false)?.ids)
    }

    /// Tokens of a text, with the special tokens that the tokenizer puts around it when `add_special`.
    pub fn encode_text(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.encode(text, add_special)?.ids)
    }

    /// Text of tokens. Ids the tokenizer does not know are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// The template for a conversation with or without tools.
    pub(super) fn template(&self, tools: Option<&Json>) -> Result<&ChatTemplate, TokenizerError> {
        let preferred = if tools.is_some() { self.tool_template.as_ref() } else { None };
        preferred.or(self.template.as_ref()).or(self.tool_template.as_ref()).ok_or(TokenizerError::NoTemplate)
    }

    /// Renders a conversation as training rows are: on the fixed date, without a generation prompt unless asked.
    pub(super) fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, TokenizerError> {
        Ok(self.template(tools)?.render(messages, tools, add_generation_prompt, Date::Fixed)?)
    }

    /// Tokens with offsets.
    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Encoded, TokenizerError> {
        let fail = |e: tokenizers::Error| TokenizerError::Encode(e.to_string());
        let plain = self.inner.encode(text, false).map_err(fail)?;
        let (ids, offsets) = (plain.get_ids().to_vec(), plain.get_offsets().to_vec());
        let (true, Some(post)) = (add_special, &self.post) else { return Ok(Encoded { ids, offsets }) };
        // The post-processor may trim offsets, so only the places of the tokens it added are taken from it.
        let full = post.process(plain, None, true).map_err(fail)?;
        let mut inner = offsets.into_iter();
        let offsets = full
            .get_special_tokens_mask()
            .iter()
            .map(|&added| if added == 1 { (0, 0) } else { inner.next().unwrap_or((0, 0)) })
            .collect();
        Ok(Encoded { ids: full.get_ids().to_vec(), offsets })
    }

    /// A control token's text within `text`, if there is any.
    pub(super) fn control_token_in(&self, text: &str) -> Option<&str> {
        self.control.find(text).map(|(_, token)| token)
    }

    /// Byte position and text of every control token in `text`, ascending.
    pub(super) fn control_tokens<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let (at, token) = self.control.find(&text[from..])?;
            let at = from + at;
            from = at + token.len();
            Some((at, token))
        })
    }

    /// What the template writes around an assistant's turn.
    pub(super) fn probe(&self) -> &Probe {
        &self.probe
    }

    fn added_tokens(&self) -> impl Iterator<Item = AddedToken> + '_ {
        self.inner.get_added_tokens_decoder().into_values()
    }

    /// Renders a conversation of two turns to see the header and the end of the assistant's turn. A template that
    /// refuses it leaves the header empty.
    fn learn_probe(&self) -> Probe {
        const QUESTION: &str = "q7f3";
        const ANSWER: &str = "a9e1";
        let mut closing: Vec<String> =
            self.eos_ids.iter().filter_map(|&id| self.inner.id_to_token(id)).collect();
        let user = json!({"role": "user", "content": QUESTION});
        let assistant = json!({"role": "assistant", "content": ANSWER});
        let Ok(template) = self.template(None) else { return Probe { closing, ..Probe::default() } };
        let render = |messages: &[Json], add: bool| template.render(messages, None, add, Date::Fixed).ok();
        let with = render(std::slice::from_ref(&user), true).map(|r| r.text).unwrap_or_default();
        let without = render(std::slice::from_ref(&user), false).map(|r| r.text).unwrap_or_default();
        let header = with.strip_prefix(&without).unwrap_or_default().to_owned();
        let user_close =
            with.rfind(QUESTION).map(|at| with[at + QUESTION.len()..].to_owned()).unwrap_or_default();
        if let Some(rendered) = render(&[user, assistant], false)
            && let Some(at) = rendered.text.rfind(ANSWER)
        {
            let after = &rendered.text[at + ANSWER.len()..];
            let tokens = Control::new(self.added_tokens().map(|t| t.content));
            if let Some((_, token)) = tokens.find(after) {
                closing.push(token.to_owned());
            }
        }
        closing.sort();
        closing.dedup();
        Probe { header, user_close, closing }
    }
}

/// A set of token texts, found by their first byte.
#[derive(Debug, Default)]
struct Control {
    by_first_byte: BTreeMap<u8, Vec<String>>,
}

impl Control {
    fn new(tokens: impl Iterator<Item = String>) -> Self {
        let mut by_first_byte: BTreeMap<u8, Vec<String>> = BTreeMap::new();
        for token in tokens {
            // A token that is only white space would forbid white space in rows.
            if !token.trim().is_empty() {
                by_first_byte.entry(token.as_bytes()[0]).or_default().push(token);
            }
        }
        for tokens in by_first_byte.values_mut() {
            tokens.sort_by_key(|t| std::cmp::Reverse(t.len()));
        }
        Self { by_first_byte }
    }

    /// The first token in `text`; the longest where several start at one place.
    fn find(&self, text: &str) -> Option<(usize, &str)> {
        text.bytes().enumerate().find_map(|(at, byte)| {
            let rest = &text.as_bytes()[at..];
            let tokens = self.by_first_byte.get(&byte)?;
            tokens.iter().find(|t| rest.starts_with(t.as_bytes())).map(|t| (at, t.as_str()))
        })
    }
}

/// The bytes of a file, or `None` when it is not there.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { path: path.into(), source }),
    }
}

fn read_json(path: &Path) -> Result<Option<Json>, TokenizerError> {
    read(path)?
        .map(|bytes| serde_json::from_slice(&bytes))
        .transpose()
        .map_err(|e| TokenizerError::Invalid { path: path.into(), reason: e.to_string() })
}

/// The template file's text, or `None`.
fn read_text(path: &Path) -> Result<Option<String>, TokenizerError> {
    read(path)?
        .map(String::from_utf8)
        .transpose()
        .map_err(|e| TokenizerError::Invalid { path: path.into(), reason: e.to_string() })
}

/// A special token is written as a string or as an object with `content`.
fn token_text(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str()).filter(|t| !t.is_empty())
}

/// Makes sure that every special token which the configs name is one for the tokenizer too.
fn add_special_tokens(
    inner: &mut Tokenizer,
    special: &BTreeMap<String, String>,
    config: &Json,
    map: &Json,
) -> Result<(), String> {
    let mut names: Vec<String> = special.values().cloned().collect();
    for list in ["additional_special_tokens", "extra_special_tokens"] {
        for value in [config.get(list), map.get(list)].into_iter().flatten() {
            let items: Vec<&Json> = match value {
                Json::Array(items) => items.iter().collect(),
                Json::Object(items) => items.values().collect(),
                _ => Vec::new(),
            };
            names.extend(items.into_iter().filter_map(token_text).map(str::to_owned));
        }
    }
    let known = inner.get_added_tokens_decoder();
    let mut missing: Vec<AddedToken> = Vec::new();
    // Tokens that only the config's decoder table has come first and in the order of their ids: they get the next ids.
    let mut decoder: Vec<(u64, &Json)> = config
        .get("added_tokens_decoder")
        .and_then(Json::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse().ok()?, token)))
        .collect();
    decoder.sort_by_key(|(id, _)| *id);
    let flag = |token: &Json, key: &str| token.get(key).and_then(Json::as_bool).unwrap_or(false);
    for (_, token) in decoder {
        if let Some(text) = token_text(token)
            && !known.values().any(|k| k.content == text)
        {
            missing.push(
                AddedToken::from(text, flag(token, "special"))
                    .single_word(flag(token, "single_word"))
                    .lstrip(flag(token, "lstrip"))
                    .rstrip(flag(token, "rstrip"))
                    .normalized(flag(token, "normalized")),
            );
        }
    }
    for name in names {
        match known.values().find(|k| k.content == name) {
            Some(token) if token.special => {}
            Some(token) => missing.push(token.clone().special(true)),
            None if missing.iter().any(|m| m.content == name) => {}
            None => missing.push(AddedToken::from(name, true)),
        }
    }
    inner.add_tokens(missing).map(|_| ()).map_err(|e| e.to_string())
}

/// The chat template's text and that of the template for tools.
fn templates(
    dir: &Path,
    config: &Json,
    config_path: &Path,
) -> Result<(String, Option<String>), TokenizerError> {
    let tool_file = read_text(&dir.join("additional_chat_templates").join("tool_use.jinja"))?;
    if let Some(text) = read_text(&dir.join("chat_template.jinja"))? {
        return Ok((text, tool_file));
    }
    let invalid = |reason: &str| TokenizerError::Invalid { path: config_path.into(), reason: reason.into() };
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok((String::new(), tool_file)),
        Some(Json::String(text)) => Ok((text.clone(), tool_file)),
        Some(Json::Array(list)) => {
            let named = |name: &str| {
                let entry = list.iter().find(|e| e.get("name").and_then(Json::as_str) == Some(name))?;
                entry.get("template")?.as_str().map(str::to_owned)
            };
            let tool = tool_file.or_else(|| named("tool_use"));
            let default = named("default");
            if default.is_none() && tool.is_none() {
                return Err(invalid(
                    "`chat_template` is a list without an entry named \"default\" or \"tool_use\"",
                ));
            }
            Ok((default.unwrap_or_default(), tool))
        }
        Some(_) => Err(invalid("`chat_template` is neither a string nor a list of {name, template}")),
    }
}

/// `eos_token_id` of `generation_config.json`: a number, a list of numbers, or absent.
fn generation_eos(path: &Path) -> Result<Vec<u32>, TokenizerError> {
    let Some(config) = read_json(path)? else { return Ok(Vec::new()) };
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match config.get("eos_token_id") {
        None | Some(Json::Null) => Some(Vec::new()),
        Some(Json::Array(list)) => list.iter().map(id).collect(),
        Some(value) => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| TokenizerError::Invalid {
        path: path.into(),
        reason: "`eos_token_id` is neither a token id nor a list of token ids".into(),
    })
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A special token that a template post-processor inserts without defining it (the library would panic on it).
fn undefined_special_token(post: &Json) -> Option<String> {
    if let Some(inner) = post.get("processors").and_then(Json::as_array) {
        return inner.iter().find_map(undefined_special_token);
    }
    let defined = post.get("special_tokens").and_then(Json::as_object)?;
    let pieces = ["single", "pair"].into_iter().filter_map(|key| post.get(key)?.as_array()).flatten();
    pieces
        .filter_map(|piece| piece.get("SpecialToken")?.get("id")?.as_str())
        .find(|id| !defined.contains_key(*id))
        .map(str::to_owned)
}
