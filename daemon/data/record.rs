//! Rows become records: five shapes of JSON objects, three kinds of things to learn.
//!
//! | format | keys | becomes |
//! |---|---|---|
//! | `messages` | `messages`, `tools`? | a conversation |
//! | `sharegpt` | `conversations` of `{from, value}`, `system`?, `tools`? | a conversation |
//! | `prompt-completion` | `prompt`, `completion`: both strings | a text with a learnt tail |
//! | | `prompt`, `completion`: both message lists, `tools`? | a conversation whose head is never learnt |
//! | `alpaca` | `instruction`, `output`, `input`?, `system`?, `history`? | a conversation; without a chat template a text with a learnt tail |
//! | `text` | `text` | a text |
//!
//! A list or an object may also be given as a string that holds its JSON, as CSV cells and some Parquet exports do.

use super::source::kind;
use crate::config::spec::DataFormat;
use serde_json::{Map, Value as Json, json};

/// Something to learn.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Record {
    /// Rendered by the chat template.
    Chat {
        /// `{role, content, …}`; contents are strings (an object for a tool's answer), roles are known ones.
        messages: Vec<Json>,
        /// A non-empty JSON array.
        tools: Option<Json>,
        /// The first messages, which are only read: a prompt given apart from its completion.
        prompt: usize,
    },
    /// Tokenised as one text; the completion and the end token are learnt.
    Completion {
        /// Only read.
        prompt: String,
        /// Learnt.
        completion: String,
    },
    /// Learnt whole.
    Text(String),
}

/// Roles a message may have. `tool_calls` and `tool_results` are Mistral's.
const ROLES: [&str; 9] =
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "tool_calls", "tool_results"];

/// The keys that make a row one of a format, in the order in which they are tried: a data set that has been rendered
/// before (`text` beside `messages`) is better rendered again by the template of this model.
const FORMATS: [(DataFormat, &[&str]); 5] = [
    (DataFormat::Messages, &["messages"]),
    (DataFormat::Sharegpt, &["conversations"]),
    (DataFormat::PromptCompletion, &["prompt", "completion"]),
    (DataFormat::Alpaca, &["instruction", "output"]),
    (DataFormat::Text, &["text"]),
];

/// The format's name in a spec.
pub(super) fn format_name(format: DataFormat) -> &'static str {
    match format {
        DataFormat::Auto => "auto",
        DataFormat::Messages => "messages",
        DataFormat::PromptCompletion => "prompt-completion",
        DataFormat::Text => "text",
        DataFormat::Alpaca => "alpaca",
        DataFormat::Sharegpt => "sharegpt",
    }
}

/// The format of one row by its keys.
fn format_of(row: &Map<String, Json>) -> Option<DataFormat> {
    FORMATS.iter().find(|(_, keys)| keys.iter().all(|key| row.contains_key(*key))).map(|(format, _)| *format)
}

/// The format of a file by its first rows: the one most of them have, the earlier one among equals. `Err` is what to
/// tell the user when none has any.
pub(super) fn detect(rows: &[Map<String, Json>]) -> Result<DataFormat, String> {
    let found: Vec<DataFormat> = rows.iter().filter_map(format_of).collect();
    let count = |format: DataFormat| found.iter().filter(|f| **f == format).count();
    let best = found.iter().copied().reduce(|best, f| if count(f) > count(best) { f } else { best });
    best.ok_or_else(|| {
        let keys: Vec<&str> =
            rows.first().map(|r| r.keys().map(String::as_str).collect()).unwrap_or_default();
        let hint = if keys.contains(&"chosen") && keys.contains(&"rejected") {
            " (preference pairs cannot be learnt by method = \"sft\")"
        } else {
            ""
        };
        format!("no known row format has the keys {keys:?}{hint}; known are: {}", known_formats())
    })
}

fn known_formats() -> String {
    FORMATS
        .iter()
        .map(|(format, keys)| format!("{} ({})", format_name(*format), keys.join(", ")))
        .collect::<Vec<_>>()
        .join("; ")
}

/// One row as a record, or what is wrong with it.
///
/// `chat` says whether the model has a chat template; only Alpaca rows, which are neither, depend on it.
pub(super) fn parse(row: &Map<String, Json>, format: DataFormat, chat: bool) -> Result<Record, String> {
    if let Some((_, keys)) = FORMATS.iter().find(|(f, _)| *f == format)
        && let Some(key) = keys.iter().find(|key| !row.contains_key(**key))
    {
        let other = match format_of(row) {
            Some(other) => format!("it looks like {}", format_name(other)),
            None => format!("its keys are {:?}", row.keys().collect::<Vec<_>>()),
        };
        return Err(format!("the file's rows are {}, this one has no `{key}`: {other}", format_name(format)));
    }
    match format {
        DataFormat::Auto => Err("the row format was not decided".into()),
        DataFormat::Text => Ok(Record::Text(string(row, "text")?)),
        DataFormat::Messages => {
            let messages = messages(&row["messages"], "messages")?;
            Ok(Record::Chat { messages, tools: tools(row)?, prompt: 0 })
        }
        DataFormat::PromptCompletion => prompt_completion(row),
        DataFormat::Alpaca => alpaca(row, chat),
        DataFormat::Sharegpt => sharegpt(row),
    }
}

fn prompt_completion(row: &Map<String, Json>) -> Result<Record, String> {
    let (prompt, completion) = (embedded(&row["prompt"]), embedded(&row["completion"]));
    match (&prompt, &completion) {
        (Json::Array(_), Json::Array(_)) => {
            let mut all = messages(&prompt, "prompt")?;
            let head = all.len();
            all.extend(messages(&completion, "completion")?);
            Ok(Record::Chat { messages: all, tools: tools(row)?, prompt: head })
        }
        // A string that happens to be JSON stays the string it is, unless both sides are message lists.
        _ => match (&row["prompt"], &row["completion"]) {
            (Json::String(prompt), Json::String(completion)) => {
                Ok(Record::Completion { prompt: prompt.clone(), completion: completion.clone() })
            }
            (p, c) => Err(format!(
                "`prompt` is {} and `completion` is {}: both must be strings, or both message lists",
                kind(p),
                kind(c)
            )),
        },
    }
}

fn alpaca(row: &Map<String, Json>, chat: bool) -> Result<Record, String> {
    let instruction = string(row, "instruction")?;
    let output = string(row, "output")?;
    let question = match optional_string(row, "input")? {
        Some(input) if !input.is_empty() => format!("{instruction}\n{input}"),
        _ => instruction,
    };
    let system = optional_string(row, "system")?.filter(|s| !s.is_empty());
    let history = match row.get("history").map(embedded) {
        None | Some(Json::Null) => Vec::new(),
        Some(Json::Array(pairs)) => pairs
            .iter()
            .map(|pair| match pair.as_array().map(Vec::as_slice) {
                Some([Json::String(q), Json::String(a)]) => Ok((q.clone(), a.clone())),
                _ => Err("`history` must be a list of [question, answer] pairs of strings".to_owned()),
            })
            .collect::<Result<_, _>>()?,
        Some(Json::String(text)) if text.is_empty() => Vec::new(),
        Some(other) => return Err(format!("`history` must be a list, it is {}", kind(&other))),
    };
    if chat {
        let mut messages = Vec::with_capacity(2 * history.len() + 3);
        messages.extend(system.map(|s| message("system", s)));
        for (q, a) in history {
            messages.push(message("user", q));
            messages.push(message("assistant", a));
        }
        messages.push(message("user", question));
        messages.push(message("assistant", output));
        Ok(Record::Chat { messages, tools: None, prompt: 0 })
    } else {
        let mut prompt = String::new();
        let turns = history.iter().flat_map(|(q, a)| [q, a]);
        for part in system.iter().chain(turns).chain([&question]) {
            prompt.push_str(part);
            prompt.push('\n');
        }
        Ok(Record::Completion { prompt, completion: output })
    }
}

fn sharegpt(row: &Map<String, Json>) -> Result<Record, String> {
    let Json::Array(turns) = embedded(&row["conversations"]) else {
        return Err(format!("`conversations` must be a list, it is {}", kind(&row["conversations"])));
    };
    let mut converted = Vec::with_capacity(turns.len() + 1);
    if let Some(system) = optional_string(row, "system")?.filter(|s| !s.is_empty()) {
        converted.push(message("system", system));
    }
    for (i, turn) in turns.iter().enumerate() {
        let (Some(from), Some(value)) = (turn.get("from"), turn.get("value")) else {
            if turn.get("role").is_some() {
                // Some data sets keep ShareGPT's outer key and OpenAI's inner ones.
                converted.push(turn.clone());
                continue;
            }
            return Err(format!("conversations[{i}] must have `from` and `value`"));
        };
        let Json::String(value) = value else {
            return Err(format!("conversations[{i}].value must be a string, it is {}", kind(value)));
        };
        converted.push(match from.as_str() {
            Some("human" | "user") => message("user", value.clone()),
            Some("gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard") => message("assistant", value.clone()),
            Some("system") => message("system", value.clone()),
            Some("observation" | "tool" | "function_response") => message("tool", value.clone()),
            Some("function_call") => json!({
                "role": "assistant",
                "content": "",
                "tool_calls": function_calls(value).map_err(|e| format!("conversations[{i}].value: {e}"))?,
            }),
            _ => {
                return Err(format!(
                    "conversations[{i}].from is {from}; known are human, gpt, system, observation, function_call"
                ));
            }
        });
    }
    let messages = messages(&Json::Array(converted), "conversations")?;
    Ok(Record::Chat { messages, tools: tools(row)?, prompt: 0 })
}

/// ShareGPT's `function_call`: the JSON of one call or of a list of calls.
fn function_calls(value: &str) -> Result<Json, String> {
    let parsed: Json = serde_json::from_str(value)
        .map_err(|e| format!("a function call must be JSON with `name` and `arguments`: {e}"))?;
    let calls = match parsed {
        Json::Array(calls) => calls,
        call => vec![call],
    };
    let call = |call: &Json| {
        let (Some(Json::String(name)), Some(arguments)) = (call.get("name"), call.get("arguments")) else {
            return Err("a function call must have a `name` and `arguments`".to_owned());
        };
        Ok(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
    };
    Ok(Json::Array(calls.iter().map(call).collect::<Result<_, _>>()?))
}

fn message(role: &str, content: String) -> Json {
    json!({"role": role, "content": content})
}

/// Checks a list of messages and makes every content a string. Keys we do not know go to the template as they are.
fn messages(value: &Json, key: &str) -> Result<Vec<Json>, String> {
    let Json::Array(list) = embedded(value) else {
        return Err(format!("`{key}` must be a list of messages, it is {}", kind(value)));
    };
    if list.is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    list.into_iter()
        .enumerate()
        .map(|(i, m)| check_message(m).map_err(|e| format!("{key}[{i}]: {e}")))
        .collect()
}

fn check_message(message: Json) -> Result<Json, String> {
    let Json::Object(mut message) = message else {
        return Err(format!("a message must be an object, this is {}", kind(&message)));
    };
    let role = match message.get("role") {
        Some(Json::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(Json::String(role)) => {
            return Err(format!("unknown role {role:?}; known are {}", ROLES.join(", ")));
        }
        Some(other) => return Err(format!("`role` must be a string, it is {}", kind(other))),
        None => return Err("`role` is missing".into()),
    };
    let calls = match message.get("tool_calls") {
        None | Some(Json::Null) => false,
        Some(Json::Array(calls)) => {
            if let Some(bad) = calls.iter().find(|c| !c.is_object()) {
                return Err(format!("an entry of `tool_calls` must be an object, it is {}", kind(bad)));
            }
            !calls.is_empty()
        }
        Some(other) => return Err(format!("`tool_calls` must be a list, it is {}", kind(other))),
    };
    let content = match message.get("content") {
        Some(Json::String(_)) => None,
        Some(Json::Array(parts)) if role != "tool_calls" => Some(join_parts(parts)?),
        // The shapes Mistral's templates read.
        Some(Json::Object(_)) if role.starts_with("tool") => None,
        Some(Json::Array(_)) => None,
        None | Some(Json::Null) if calls => None,
        None | Some(Json::Null) => return Err("`content` is missing".into()),
        Some(other) => {
            return Err(format!("`content` must be a string or a list of text parts, it is {}", kind(other)));
        }
    };
    if let Some(text) = content {
        message.insert("content".into(), Json::String(text));
    }
    Ok(Json::Object(message))
}

/// A content in parts, of which only text can be learnt.
fn join_parts(parts: &[Json]) -> Result<String, String> {
    parts
        .iter()
        .map(|part| match (part.get("type").and_then(Json::as_str), part.get("text")) {
            (Some("text") | None, Some(Json::String(text))) => Ok(text.as_str()),
            (Some(other), _) if other != "text" => {
                Err(format!("a content part of type {other:?} cannot be learnt; only \"text\" can"))
            }
            _ => Err("a content part must be {\"type\": \"text\", \"text\": …}".to_owned()),
        })
        .collect()
}

/// `tools`, or nothing when it is absent, null or empty.
fn tools(row: &Map<String, Json>) -> Result<Option<Json>, String> {
    match row.get("tools").map(embedded) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Json::Array(list)) if list.is_empty() => Ok(None),
        Some(Json::Array(list)) => match list.iter().find(|tool| !tool.is_object()) {
            Some(bad) => Err(format!("an entry of `tools` must be an object, it is {}", kind(bad))),
            None => Ok(Some(Json::Array(list))),
        },
        Some(other) => Err(format!("`tools` must be a list, it is {}", kind(&other))),
    }
}

/// The value, or what a string holds when that is the JSON of a list or an object.
fn embedded(value: &Json) -> Json {
    if let Json::String(text) = value
        && text.trim_start().starts_with(['[', '{'])
        && let Ok(inner) = serde_json::from_str(text)
    {
        return inner;
    }
    value.clone()
}

fn string(row: &Map<String, Json>, key: &str) -> Result<String, String> {
    match row.get(key) {
        Some(Json::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}` must be a string, it is {}", kind(other))),
        None => Err(format!("`{key}` is missing")),
    }
}

fn optional_string(row: &Map<String, Json>, key: &str) -> Result<Option<String>, String> {
    match row.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(_) => string(row, key).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: Json) -> Map<String, Json> {
        value.as_object().unwrap().clone()
    }

    fn chat(value: Json, format: DataFormat) -> Result<Json, String> {
        match parse(&row(value), format, true)? {
            Record::Chat { messages, .. } => Ok(Json::Array(messages)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn formats_are_seen_in_the_keys() {
        let detect_one = |value: Json| detect(&[row(value)]);
        assert_eq!(detect_one(json!({"messages": [], "text": ""})), Ok(DataFormat::Messages));
        assert_eq!(detect_one(json!({"conversations": []})), Ok(DataFormat::Sharegpt));
        assert_eq!(detect_one(json!({"prompt": "", "completion": ""})), Ok(DataFormat::PromptCompletion));
        assert_eq!(detect_one(json!({"instruction": "", "output": "", "text": ""})), Ok(DataFormat::Alpaca));
        assert_eq!(detect_one(json!({"text": ""})), Ok(DataFormat::Text));
        let e = detect_one(json!({"prompt": "", "chosen": "", "rejected": ""})).unwrap_err();
        assert!(e.contains("preference"), "{e}");
        let (text, other) = (row(json!({"text": ""})), row(json!({"messages": []})));
        assert_eq!(detect(&[text.clone(), other.clone(), other]), Ok(DataFormat::Messages));
        assert_eq!(detect(&[text, row(json!({"messages": []}))]), Ok(DataFormat::Text));
    }

    #[test]
    fn a_row_of_another_shape_says_which() {
        let e = parse(&row(json!({"text": "x"})), DataFormat::Messages, true).unwrap_err();
        assert!(e.contains("no `messages`") && e.contains("looks like text"), "{e}");
    }

    #[test]
    fn messages_are_checked() {
        let m = |value: Json| chat(json!({"messages": value}), DataFormat::Messages);
        assert_eq!(
            m(json!(
                "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}],\"x\":1}]"
            )),
            Ok(json!([{"role": "user", "content": "ab", "x": 1}]))
        );
        assert!(m(json!([{"role": "assistant", "content": null, "tool_calls": [{"function": {}}]}])).is_ok());
        for (bad, reason) in [
            (json!([]), "empty"),
            (json!("hello"), "must be a list"),
            (json!([1]), "must be an object"),
            (json!([{"content": "a"}]), "`role` is missing"),
            (json!([{"role": "alien", "content": "a"}]), "unknown role"),
            (json!([{"role": "user"}]), "`content` is missing"),
            (json!([{"role": "user", "content": 3}]), "a number"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "cannot be learnt"),
            (json!([{"role": "assistant", "content": null, "tool_calls": []}]), "`content` is missing"),
        ] {
            let e = m(bad.clone()).unwrap_err();
            assert!(e.contains(reason), "{bad}: {e}");
        }
    }

    #[test]
    fn sharegpt_becomes_messages() {
        let converted = chat(
            json!({"system": "s", "tools": "[]", "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ]}),
            DataFormat::Sharegpt,
        );
        assert_eq!(
            converted,
            Ok(json!([
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "a"},
            ]))
        );
        for (turn, reason) in [
            (json!({"from": "alien", "value": ""}), "known are"),
            (json!({"from": "function_call", "value": "f(x)"}), "must be JSON"),
            (json!({"value": ""}), "`from` and `value`"),
        ] {
            let e = chat(json!({"conversations": [turn]}), DataFormat::Sharegpt).unwrap_err();
            assert!(e.contains(reason), "{e}");
        }
    }

    #[test]
    fn alpaca_with_and_without_a_template() {
        let value =
            json!({"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]});
        assert_eq!(
            chat(value.clone(), DataFormat::Alpaca),
            Ok(json!([
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "i\nx"},
                {"role": "assistant", "content": "o"},
            ]))
        );
        assert_eq!(
            parse(&row(value), DataFormat::Alpaca, false),
            Ok(Record::Completion { prompt: "s\nq\na\ni\nx\n".into(), completion: "o".into() })
        );
        let bare = json!({"instruction": "i", "input": "", "output": "o"});
        assert_eq!(
            chat(bare, DataFormat::Alpaca),
            Ok(json!([{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]))
        );
    }

    #[test]
    fn a_prompt_is_a_string_or_messages() {
        let p = |value: Json| parse(&row(value), DataFormat::PromptCompletion, true);
        assert_eq!(
            p(json!({"prompt": "[1]", "completion": "{}"})),
            Ok(Record::Completion { prompt: "[1]".into(), completion: "{}".into() })
        );
        assert!(matches!(
            p(
                json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]})
            ),
            Ok(Record::Chat { prompt: 1, .. })
        ));
        assert!(p(json!({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]})).is_err());
    }
}
