//! Records become examples: token ids, and for each token whether it is learnt.
//!
//! **Text.** Ids are those of the whole text, with the special tokens that the tokenizer puts around it and its end
//! token behind it. Of a `prompt`/`completion` pair every token with a character of the completion is learnt.
//!
//! **Conversations.** The template renders the conversation once; the tokens are those of that string. What is learnt
//! is found as ranges of its characters, and a token is learnt when it has a character in a range. A range begins right
//! after what `add_generation_prompt` would have written (there the model will have to go on) and ends behind the
//! token that ends the turn; what the template writes after that token is not learnt. The ranges are found
//!
//! 1. from the template's `{% generation %}` blocks, where it has them; else
//! 2. from the header that `add_generation_prompt` appends (`<|im_start|>assistant\n`): where it occurs exactly once for
//!    every assistant message, those are the turns; else
//! 3. by rendering, for every assistant message, the conversation before it with a generation prompt. Where that is
//!    simply a prefix of the whole, the turn begins at its end. Some templates rewrite what came before (they put the
//!    system text or the tools into the last user turn, or drop earlier reasoning). Then what the prefix ends with is
//!    looked for in the whole, at the same count: its last control token, or else the plain text with which the
//!    template closes the message before (`[/INST]`), as long as no message holds that text itself.
//!
//! In 2 and 3 the first end-of-turn token behind the beginning ends the turn. Both rest on one rule: **a row may not
//! contain the text of a control token**. A row that does is refused, so every control token in the rendered text was
//! written by the template. A turn that cannot be located is an error, never a guess.

use super::record::Record;
use super::template::{CLOSE, OPEN};
use super::tokenizer::{ChatTokenizer, TokenizerError};
use crate::config::spec::TrainOn;
use serde_json::Value as Json;
use std::ops::Range;

/// Tokens, and which of them are learnt. `mask[0]` is false: nothing stands before the first token to predict it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Example {
    pub tokens: Vec<u32>,
    pub mask: Vec<bool>,
    /// Tokens that were cut off at the end.
    pub cut: u32,
}

/// Turns a record into an example of at most `sequence_length` tokens, or says why it cannot be learnt.
pub(super) fn build(
    record: &Record,
    tokenizer: &ChatTokenizer,
    train_on: TrainOn,
    sequence_length: usize,
) -> Result<Example, String> {
    let (tokens, mut mask) = match record {
        Record::Text(text) => plain(tokenizer, text, 0)?,
        Record::Completion { prompt, completion } => {
            let learnt = if train_on == TrainOn::All { 0 } else { prompt.len() };
            plain(tokenizer, &format!("{prompt}{completion}"), learnt)?
        }
        Record::Chat { messages, tools, prompt } => {
            conversation(tokenizer, messages, tools.as_ref(), *prompt, train_on)?
        }
    };
    if let Some(first) = mask.first_mut() {
        *first = false;
    }
    let length = tokens.len();
    let mut example = Example { tokens, mask, cut: 0 };
    let had = example.mask.iter().any(|m| *m);
    if length > sequence_length {
        example.tokens.truncate(sequence_length);
        example.mask.truncate(sequence_length);
        example.cut = u32::try_from(length - sequence_length).unwrap_or(u32::MAX);
    }
    if example.mask.iter().any(|m| *m) {
        Ok(example)
    } else if had {
        Err(format!(
            "no learnt token is left: the row has {length} tokens and everything learnt lies behind \
             sequence_length = {sequence_length}"
        ))
    } else {
        Err("the row has no token to learn".into())
    }
}

/// A text without a template; learnt from byte `learnt` on, with the end token.
fn plain(tokenizer: &ChatTokenizer, text: &str, learnt: usize) -> Result<(Vec<u32>, Vec<bool>), String> {
    let (eos, eos_text) = tokenizer.eos().ok_or(
        "the tokenizer names no eos_token, so the model could never learn to stop: set it in tokenizer_config.json",
    )?;
    let text = text.strip_suffix(eos_text).filter(|rest| rest.len() >= learnt).unwrap_or(text);
    refuse_control(tokenizer, text)?;
    let encoded = tokenizer.encode(text, true).map_err(|e| e.to_string())?;
    let mut mask: Vec<bool> = if learnt == 0 {
        vec![true; encoded.ids.len()]
    } else {
        mask_of(&encoded.offsets, std::slice::from_ref(&(learnt..text.len())))
    };
    let mut tokens = encoded.ids;
    match tokens.last() {
        Some(&last) if last == eos => {
            if let Some(last) = mask.last_mut() {
                *last = true;
            }
        }
        _ => {
            tokens.push(eos);
            mask.push(true);
        }
    }
    Ok((tokens, mask))
}

fn conversation(
    tokenizer: &ChatTokenizer,
    messages: &[Json],
    tools: Option<&Json>,
    prompt: usize,
    train_on: TrainOn,
) -> Result<(Vec<u32>, Vec<bool>), String> {
    for message in messages {
        refuse_control_in(tokenizer, message)?;
    }
    if let Some(tools) = tools {
        refuse_control_in(tokenizer, tools)?;
    }
    let say = |e: TokenizerError| e.to_string();
    let rendered = tokenizer.render(messages, tools, false).map_err(say)?;
    let encoded = tokenizer.encode(&rendered.text, false).map_err(say)?;
    if train_on == TrainOn::All {
        let mask = vec![true; encoded.ids.len()];
        return Ok((encoded.ids, mask));
    }
    let turns: Vec<usize> = (0..messages.len()).filter(|&i| speaks(&messages[i])).collect();
    // Of the assistant's turns, the last ones that are learnt.
    let learnt = turns.iter().filter(|&&i| i >= prompt).count();
    let learnt = if train_on == TrainOn::Completion && prompt == 0 { learnt.min(1) } else { learnt };
    if learnt == 0 {
        return Err("the conversation has no assistant message to learn".into());
    }
    let ranges = if tokenizer.template(tools).map_err(say)?.has_generation() {
        if rendered.generated.len() < learnt
            || (learnt < turns.len() && rendered.generated.len() != turns.len())
        {
            return Err(format!(
                "the template's generation blocks mark {} turns, the row has {}",
                rendered.generated.len(),
                turns.len()
            ));
        }
        rendered.generated.clone()
    } else {
        locate(tokenizer, messages, tools, &turns, &rendered.text)?
    };
    let first = if learnt == turns.len() { 0 } else { ranges.len() - learnt };
    let mask = mask_of(&encoded.offsets, &ranges[first..]);
    Ok((encoded.ids, mask))
}

/// Whether a message is the assistant's. Mistral's templates also take tool calls as a role of their own.
fn speaks(message: &Json) -> bool {
    matches!(message.get("role").and_then(Json::as_str), Some("assistant" | "tool_calls"))
}

/// A token is learnt when it has a character in a range. Ranges and tokens both ascend.
fn mask_of(offsets: &[(usize, usize)], ranges: &[Range<usize>]) -> Vec<bool> {
    let mut ranges = ranges.iter().peekable();
    offsets
        .iter()
        .map(|&(start, end)| {
            while ranges.peek().is_some_and(|range| range.end <= start) {
                ranges.next();
            }
            start < end && ranges.peek().is_some_and(|range| range.start < end)
        })
        .collect()
}

/// Steps 2 and 3 of the module's head: the range of every assistant message in `text`.
fn locate(
    tokenizer: &ChatTokenizer,
    messages: &[Json],
    tools: Option<&Json>,
    turns: &[usize],
    text: &str,
) -> Result<Vec<Range<usize>>, String> {
    let header = tokenizer.probe().header.as_str();
    let sure =
        tokenizer.control_token_in(header).is_some() || !messages.iter().any(|m| holds(m, header.trim()));
    let starts: Vec<usize> = if !header.is_empty() && sure && text.matches(header).count() == turns.len() {
        text.match_indices(header).map(|(at, _)| at + header.len()).collect()
    } else {
        turns
            .iter()
            .map(|&i| {
                start_by_prefix(tokenizer, &messages[..i], tools, text).map_err(|e| {
                    format!("cannot tell where message {i} begins in the rendered conversation: {e}")
                })
            })
            .collect::<Result<_, _>>()?
    };
    let mut ranges = Vec::with_capacity(starts.len());
    let mut before = 0;
    for (k, &start) in starts.iter().enumerate() {
        let limit = starts.get(k + 1).copied().unwrap_or(text.len());
        if start < before || limit < start {
            return Err("the template does not render the assistant's turns in their order".into());
        }
        let end = end_of_turn(tokenizer, &text[start..limit]).ok_or_else(|| {
            format!(
                "the template writes no end token behind message {}, so the model could never learn to stop",
                turns[k]
            )
        })?;
        before = start + end;
        ranges.push(start..before);
    }
    Ok(ranges)
}

/// Bytes up to and with the first token that ends a turn.
fn end_of_turn(tokenizer: &ChatTokenizer, turn: &str) -> Option<usize> {
    tokenizer
        .control_tokens(turn)
        .find(|(_, token)| tokenizer.probe().closing.iter().any(|c| c == token))
        .map(|(at, token)| at + token.len())
}

/// Step 3: where the turn after `before` begins in `text`.
fn start_by_prefix(
    tokenizer: &ChatTokenizer,
    before: &[Json],
    tools: Option<&Json>,
    text: &str,
) -> Result<usize, String> {
    if before.is_empty() {
        return Err(
            "the conversation begins with the assistant, and the template's generation prompt is no guide"
                .into(),
        );
    }
    let render = |prompt| tokenizer.render(before, tools, prompt).map(|r| r.text).map_err(|e| e.to_string());
    let prefix = render(true)?;
    if text.starts_with(&prefix) {
        return Ok(prefix.len());
    }
    if let Some((at, token)) = tokenizer.control_tokens(&prefix).last() {
        let count = tokenizer.control_tokens(&prefix).filter(|(_, t)| *t == token).count();
        if let Some((found, _)) = tokenizer.control_tokens(text).filter(|(_, t)| *t == token).nth(count - 1) {
            let start = found + token.len();
            let (tail, rest) = (&prefix[at + token.len()..], &text[start..]);
            if rest.starts_with(tail) {
                return Ok(start + tail.len());
            }
            // The generation prompt may open something that a turn of the past does not have (`<think>\n`). Then the
            // difference lies within it, and what they share up to the end of a line is the header.
            let unprompted = render(false)?;
            let said = unprompted.len().saturating_sub(at + token.len());
            if prefix.starts_with(&unprompted) && rest.as_bytes().starts_with(&tail.as_bytes()[..said]) {
                let shared = tail.bytes().zip(rest.bytes()).take_while(|(a, b)| a == b).count();
                let line =
                    tail.as_bytes()[said..shared].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
                return Ok(start + said + line);
            }
        }
    }
    let close =
        closing_text(tokenizer, before, &prefix).ok_or("the template rewrites the turns before it")?;
    if before.iter().any(|message| holds(message, close.trim())) {
        return Err(format!(
            "a message holds the text {:?}, with which the template closes turns",
            close.trim()
        ));
    }
    let count = prefix.matches(close).count();
    let found = text.match_indices(close).nth(count.saturating_sub(1));
    let (at, _) = found.ok_or("the template rewrites the turns before it")?;
    Ok(at + close.len())
}

/// What the template writes behind the last message of `before`, which `prefix` renders.
fn closing_text<'a>(tokenizer: &'a ChatTokenizer, before: &[Json], prefix: &'a str) -> Option<&'a str> {
    let last = before.last()?;
    let close = if last.get("role").and_then(Json::as_str) == Some("user") {
        tokenizer.probe().user_close.as_str()
    } else {
        let content = last.get("content")?.as_str()?.trim();
        let at = (!content.is_empty()).then(|| prefix.rfind(content))??;
        &prefix[at + content.len()..]
    };
    (!close.trim().is_empty() && prefix.ends_with(close)).then_some(close)
}

/// Whether a string within the value holds `text`.
fn holds(value: &Json, text: &str) -> bool {
    match value {
        Json::String(s) => s.contains(text),
        Json::Array(items) => items.iter().any(|item| holds(item, text)),
        Json::Object(map) => map.iter().any(|(key, item)| key.contains(text) || holds(item, text)),
        _ => false,
    }
}

/// Refuses text that the tokenizer or we would take for a control mark.
fn refuse_control(tokenizer: &ChatTokenizer, text: &str) -> Result<(), String> {
    if let Some(token) = tokenizer.control_token_in(text) {
        return Err(format!(
            "the row contains the text {token:?}, which this tokenizer turns into a control token: \
             give conversations as `messages` without markup, or take the text out"
        ));
    }
    if text.contains([OPEN, CLOSE]) {
        return Err("the row contains a Unicode noncharacter (U+FDD0 or U+FDD1)".into());
    }
    Ok(())
}

/// The same for every string in a JSON value, keys included: a template may write any of them.
fn refuse_control_in(tokenizer: &ChatTokenizer, value: &Json) -> Result<(), String> {
    match value {
        Json::String(text) => refuse_control(tokenizer, text),
        Json::Array(items) => items.iter().try_for_each(|item| refuse_control_in(tokenizer, item)),
        Json::Object(map) => map.iter().try_for_each(|(key, item)| {
            refuse_control(tokenizer, key)?;
            refuse_control_in(tokenizer, item)
        }),
        _ => Ok(()),
    }
}
