//! Chat templates: the Jinja text that turns a conversation into the string a model was trained on.
//!
//! Hugging Face renders them with Jinja2 in a sandbox; we render them with minijinja, set up to give the same
//! characters:
//!
//! * `trim_blocks`, `lstrip_blocks`, one trailing newline dropped; `break` and `continue`; no auto-escaping;
//! * `raise_exception(message)` and `strftime_now(format)`;
//! * `tojson` as Python's `json.dumps` writes: separators `", "` and `": "`, nothing but quotes, backslashes and
//!   control characters escaped, `indent`, `separators`, `sort_keys`, `ensure_ascii`; floats as Python prints them;
//! * Python's methods on strings, lists and dicts (minijinja-contrib's `pycompat`);
//! * keys of a message whose value is null are dropped, and `reasoning_content`, `thinking` and `reasoning` are one
//!   field under three names (transformers does both since version 5).
//!
//! `{% generation %} … {% endgeneration %}` (a transformers extension) marks what the assistant says. minijinja has no
//! custom tags, so each tag is rewritten before compiling into a block that prints one character which no text may
//! hold ([`OPEN`], [`CLOSE`]: Unicode noncharacters, meant for internal use). After rendering they are taken out, and
//! where they stood are the spans.
//!
//! **Time.** Some templates (Llama 3.x) write today's date. A training set that changes at midnight could never be
//! resumed, so rows are rendered on [`Date::Fixed`]; a prompt for generation gets [`Date::Today`].

use crate::clock::{Clock, SystemClock};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde_json::Value as Json;
use std::fmt::Write as _;
use std::ops::Range;

/// Stands where a `{% generation %}` block begins.
pub(super) const OPEN: char = '\u{FDD0}';
/// Stands where a `{% generation %}` block ends.
pub(super) const CLOSE: char = '\u{FDD1}';

/// Which day `strftime_now` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Date {
    /// 26 July 2024, midnight: the day Meta's Llama 3.x templates name when they are not told one.
    Fixed,
    /// The machine's wall clock, in its time zone.
    Today,
}

/// Instructions that one rendering may take: a conversation of a thousand turns takes about one in a hundred of them, a
/// template that never ends a few seconds.
const FUEL: u64 = 50_000_000;

/// Why a template could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The Jinja text does not compile.
    #[error("the chat template does not compile: {0}")]
    Syntax(String),
    /// The template refused the conversation (`raise_exception`), or used something this engine lacks.
    #[error("the chat template refused the conversation: {0}")]
    Render(String),
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of what the template's `generation` blocks wrote, ascending; empty when it has no such blocks.
    pub generated: Vec<Range<usize>>,
}

/// One compiled template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    env: Environment<'static>,
    has_generation: bool,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`. `special` are the variables the template sees beside the messages: `bos_token`, `eos_token`
    /// and so on.
    pub fn compile(source: &str, special: &[(String, String)]) -> Result<Self, TemplateError> {
        let (source, has_generation) = rewrite_generation_tags(source);
        let mut env = Environment::new();
        env.set_fuel(Some(FUEL));
        env.set_syntax(
            minijinja::syntax::SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|e| TemplateError::Syntax(e.to_string()))?,
        );
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", to_json);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        for (name, value) in special {
            env.add_global(name.clone(), value.clone());
        }
        env.add_template_owned(NAME, source).map_err(|e| TemplateError::Syntax(describe(&e)))?;
        Ok(Self { env, has_generation })
    }

    /// Whether the template marks the assistant's words itself.
    pub fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Renders a conversation. `tools` is a JSON array, or `None`.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
        date: Date,
    ) -> Result<Rendered, TemplateError> {
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        let strftime = Value::from_function(move |format: String| strftime_now(&format, date));
        let text = self
            .env
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages => Value::from(messages),
                    tools => tools.map_or(Value::from(()), json_value),
                    documents => Value::from(()),
                    add_generation_prompt => add_generation_prompt,
                    strftime_now => strftime,
                })
            })
            .map_err(|e| TemplateError::Render(describe(&e)))?;
        Ok(if self.has_generation { take_marks(&text) } else { Rendered { text, generated: Vec::new() } })
    }
}

/// An error with its line; minijinja's own display names the template, of which there is only one.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (template line {line})"),
        None => what,
    }
}

/// A message as a template sees it, after what transformers does to it.
fn message_value(message: &Json) -> Value {
    const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let Json::Object(map) = message else { return json_value(message) };
    let mut pairs: Vec<(&str, Value)> =
        map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), json_value(v))).collect();
    let find = |pairs: &[(&str, Value)], key: &str| pairs.iter().position(|(k, _)| *k == key);
    if let Some(at) = REASONING.iter().find_map(|key| find(&pairs, key)) {
        let reasoning = pairs[at].1.clone();
        if find(&pairs, "thinking").is_none() {
            pairs.insert(0, ("thinking", reasoning.clone()));
        }
        if find(&pairs, "reasoning_content").is_none() {
            pairs.push(("reasoning_content", reasoning));
        }
    }
    Value::from_pairs(pairs)
}

/// JSON as a template's value; keys keep their order.
fn json_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (_, Some(u)) => Value::from(u),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => Value::from(items.iter().map(json_value).collect::<Vec<_>>()),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), json_value(v)))),
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}` by blocks that print [`OPEN`] and [`CLOSE`]. Both ends of the
/// replacement are block tags carrying the original's `-` and `+`, so that whitespace control does what it did.
fn rewrite_generation_tags(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        match parse_generation_tag(tag) {
            Some((left, mark, right, length)) => {
                found = true;
                let _ = write!(out, "{{%{left} if true %}}{{{{ '{mark}' }}}}{{% endif {right}%}}");
                rest = &tag[length..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    (out, found)
}

/// `(whitespace control on the left, mark, on the right, bytes of the tag)` when `tag` starts with a generation tag.
fn parse_generation_tag(tag: &str) -> Option<(&str, char, &str, usize)> {
    // `{%}` has its end inside its beginning: look behind the two characters that open the tag.
    let inner = &tag[2..];
    let inner = &inner[..inner.find("%}")?];
    let left = if inner.starts_with(['-', '+']) { &inner[..1] } else { "" };
    let inner_rest = &inner[left.len()..];
    let right = if inner_rest.ends_with(['-', '+']) { &inner_rest[inner_rest.len() - 1..] } else { "" };
    let mark = match inner_rest[..inner_rest.len() - right.len()].trim() {
        "generation" => OPEN,
        "endgeneration" => CLOSE,
        _ => return None,
    };
    Some((left, mark, right, 2 + inner.len() + 2))
}

/// Takes the marks out of rendered text and gives the spans between them.
fn take_marks(marked: &str) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let mut generated = Vec::new();
    let mut open = None;
    for c in marked.chars() {
        match c {
            OPEN => open = open.or(Some(text.len())),
            CLOSE => {
                if let Some(start) = open.take()
                    && start < text.len()
                {
                    generated.push(start..text.len());
                }
            }
            c => text.push(c),
        }
    }
    Rendered { text, generated }
}

/// `strftime_now`.
fn strftime_now(format: &str, date: Date) -> Result<String, Error> {
    let invalid =
        |e: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}"));
    let moment = match date {
        Date::Fixed => jiff::civil::date(2024, 7, 26).to_zoned_datetime(jiff::tz::TimeZone::UTC),
        Date::Today => jiff::Timestamp::try_from(SystemClock::new().wall())
            .map(|t| t.to_zoned_datetime(jiff::tz::TimeZone::system())),
    }
    .map_err(|e| invalid(&e))?;
    jiff::fmt::strtime::format(format, &moment).map_err(|e| invalid(&e))
}

/// How `tojson` writes.
struct JsonStyle {
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

/// The filter `tojson`: `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        indent,
        item,
        key,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(&mut out, value, &style, 0)?;
    Ok(Value::from(out))
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    let newline = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
        ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let mut first = true;
            out.push('[');
            for item in value.try_iter()? {
                if !std::mem::take(&mut first) {
                    out.push_str(&style.item);
                }
                newline(out, depth + 1);
                write_json(out, &item, style, depth + 1)?;
            }
            if !first {
                newline(out, depth);
            }
            out.push(']');
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            let mut first = true;
            out.push('{');
            for key in keys {
                if !std::mem::take(&mut first) {
                    out.push_str(&style.item);
                }
                newline(out, depth + 1);
                write_json_string(out, &key.to_string(), style.ensure_ascii);
                out.push_str(&style.key);
                write_json(out, &value.get_item(&key)?, style, depth + 1)?;
            }
            if !first {
                newline(out, depth);
            }
            out.push('}');
        }
        kind => {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is not JSON")));
        }
    }
    Ok(())
}

fn write_json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    } else {
        let plain = format!("{x}");
        if plain.contains('.') { plain } else { plain + ".0" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: Json) -> Result<Rendered, TemplateError> {
        let special = [("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::compile(source, &special)?.render(
            messages.as_array().unwrap(),
            None,
            false,
            Date::Fixed,
        )
    }

    fn text(source: &str, messages: Json) -> String {
        render(source, messages).unwrap().text
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_sets_jinja_up() {
        let source = "{{ bos_token }}\n  {% for m in messages %}\n[{{ m.content }}]\n  {% endfor %}\nend\n";
        assert_eq!(text(source, json!([{"content": "a"}, {"content": "b"}])), "<s>\n[a]\n[b]\nend");
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        // json.dumps(x, ensure_ascii=False) under CPython 3.11.
        let x = json!([{"content": {"a": [1, 2.0, 1e20, 1.5e-7, -0.0, true, null], "é<&>'": "\"\\\n\u{1}\u{7f}", "e": {}}}]);
        assert_eq!(
            text("{{ messages[0].content | tojson }}", x.clone()),
            "{\"a\": [1, 2.0, 1e+20, 1.5e-07, -0.0, true, null], \"é<&>'\": \"\\\"\\\\\\n\\u0001\u{7f}\", \"e\": {}}"
        );
        assert_eq!(
            text(
                "{{ messages[0].content.a[:2] | tojson(indent=2) }}|{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
                x
            ),
            "[\n  1,\n  2.0\n]|{\"a\":\"\\u00e9\",\"b\":1}"
        );
    }

    #[test]
    fn values_print_as_python_prints_them() {
        assert_eq!(
            text(
                "{{ messages[0].content }} {{ true }} {{ 1.0 }} {{ missing }}",
                json!([{"content": {"a": "x", "b": [1, false]}}])
            ),
            "{'a': 'x', 'b': [1, False]} True 1.0 "
        );
    }

    #[test]
    fn exceptions_and_syntax_errors_are_told_apart() {
        let e = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert!(matches!(&e, TemplateError::Render(m) if m.contains("roles must alternate")), "{e}");
        assert!(matches!(render("{% for %}", json!([])), Err(TemplateError::Syntax(_))));
    }

    #[test]
    fn the_date_of_a_training_row_never_changes() {
        assert_eq!(text("{{ strftime_now('%d %b %Y') }}", json!([])), "26 Jul 2024");
    }

    #[test]
    fn null_keys_are_dropped_and_reasoning_has_three_names() {
        let source = "{{ messages[0].content is defined }} {{ messages[0].reasoning_content }} {{ messages[0].thinking }}";
        assert_eq!(text(source, json!([{"content": null, "reasoning": "r"}])), "False r r");
    }

    #[test]
    fn generation_tags_become_spans() {
        let source = "{%- for m in messages %}\n  {%- if m.role == 'assistant' %}\nA:{% generation %}\n{{ m.content }}!\n{%- endgeneration %}\n;{% else %}U:{{ m.content }};{% endif %}\n{%- endfor %}";
        let r = render(
            source,
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}, {"role": "assistant", "content": "b"}]),
        )
        .unwrap();
        let spans: Vec<&str> = r.generated.iter().map(|s| &r.text[s.clone()]).collect();
        assert_eq!(spans, ["é!", "b!"], "{:?}", r.text);
        assert!(!r.text.contains([OPEN, CLOSE]));
    }
}
