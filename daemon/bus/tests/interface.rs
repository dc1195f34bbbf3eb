//! The interface that is served is the one that `docs/dbus/` describes.

use super::*;
use crate::runs::fake::queued;
use std::collections::{BTreeMap, BTreeSet};
use zbus::fdo;

/// An element of introspection data: `method`, `property`, `arg`, `annotation` …, its attributes and what it contains.
#[derive(Clone, Debug, PartialEq)]
struct Element {
    tag: String,
    attributes: BTreeMap<String, String>,
    children: Vec<Element>,
}

/// Reads XML without namespaces, entities and CDATA, which introspection data does without. Text is skipped, and so are
/// comments, declarations and elements of documentation (`doc:…`).
fn parse(text: &str) -> Element {
    let mut stack = vec![Element { tag: String::new(), attributes: BTreeMap::new(), children: Vec::new() }];
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        rest = &rest[start..];
        if rest.starts_with("<!--") {
            rest = &rest[rest.find("-->").expect("the end of a comment") + 3..];
            continue;
        }
        let end = rest.find('>').expect("the end of a tag");
        let (tag, after) = (&rest[1..end], &rest[end + 1..]);
        rest = after;
        if tag.starts_with(['!', '?']) {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            let done = stack.pop().unwrap();
            assert_eq!(done.tag, name, "elements are closed in order");
            stack.last_mut().expect("an open element").children.push(done);
            continue;
        }
        let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, mut attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
        let mut element =
            Element { tag: name.to_string(), attributes: BTreeMap::new(), children: Vec::new() };
        while let Some((key, value)) = attributes.split_once('=') {
            let quote = value.chars().next().unwrap();
            let (value, after) = value[1..].split_once(quote).expect("a closed attribute");
            element.attributes.insert(key.trim().to_string(), value.to_string());
            attributes = after;
        }
        match empty {
            true => stack.last_mut().unwrap().children.push(element),
            false => stack.push(element),
        }
    }
    assert_eq!(stack.len(), 1, "unclosed: {:?}", stack.last().map(|element| &element.tag));
    stack.remove(0)
}

/// The interface `name`, a line for each fact, in the order of names but for arguments.
fn facts(document: &Element, name: &str) -> BTreeSet<String> {
    fn find<'a>(element: &'a Element, name: &str) -> Option<&'a Element> {
        let fits = |e: &&Element| e.tag == "interface" && e.attributes["name"] == name;
        let nodes = element.children.iter().filter(|e| e.tag == "node");
        element.children.iter().find(fits).or_else(|| nodes.flat_map(|node| find(node, name)).next())
    }
    let interface = find(document, name).unwrap_or_else(|| panic!("no interface {name}"));
    let mut facts = BTreeSet::new();
    for member in interface.children.iter().filter(|e| !e.tag.starts_with("doc:")) {
        let mut fact = format!("{} {:?}", member.tag, member.attributes);
        for part in member.children.iter().filter(|e| !e.tag.starts_with("doc:")) {
            let mut attributes = part.attributes.clone();
            // The default of a method's argument, of which a signal has none other.
            if part.tag == "arg" && member.tag == "method" {
                attributes.entry("direction".into()).or_insert_with(|| "in".into());
            }
            fact += &format!("\n    {} {attributes:?}", part.tag);
        }
        facts.insert(fact);
    }
    assert!(!facts.is_empty());
    facts
}

async fn served(client: &Client, path: &str) -> Element {
    let node = fdo::IntrospectableProxy::builder(&client.connection)
        .destination("org.finetuned.Finetuned1")
        .path(path)
        .build()
        .await
        .unwrap();
    parse(&node.introspect().await.unwrap())
}

fn documented(file: &str) -> (String, Element) {
    let path = format!("{}/docs/dbus/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let parsed = parse(&text);
    (text, parsed)
}

#[tokio::test]
async fn the_documentation_describes_what_is_served() {
    let bench = Bench::new(Authorization::Owner);
    bench.fake.add(queued(1, ADA));
    let client = bench.client(EVE, &[]).await;
    let root = || ROOT.to_string();
    for (path, name) in [(root(), "Manager"), (root(), "Governor"), (path_of(1), "Run")] {
        let name = format!("org.finetuned.Finetuned1.{name}");
        let (text, document) = documented(&format!("{name}.xml"));
        let served = served(&client, &path).await;
        let (written, served) = (facts(&document, &name), facts(&served, &name));
        let missing: Vec<&String> = served.difference(&written).collect();
        let wrong: Vec<&String> = written.difference(&served).collect();
        assert!(
            missing.is_empty() && wrong.is_empty(),
            "{name}\nserved, not documented: {missing:#?}\ndocumented, not served: {wrong:#?}"
        );
        assert_every_member_has_prose(&text, &document, &name);
    }
}

/// Every method, argument and property has its prose.
fn assert_every_member_has_prose(text: &str, document: &Element, name: &str) {
    assert!(text.contains("xmlns:doc="), "{name}");
    fn check(element: &Element, place: &str, bare: &mut Vec<String>) {
        for child in &element.children {
            let called = child.attributes.get("name").map_or("", String::as_str);
            let place = format!("{place}/{called}");
            let documents =
                matches!(child.tag.as_str(), "interface" | "method" | "arg" | "property" | "signal");
            if documents && !child.children.iter().any(|e| e.tag == "doc:doc") {
                bare.push(place.clone());
            }
            check(child, &place, bare);
        }
    }
    let mut bare = Vec::new();
    check(document, "", &mut bare);
    assert!(bare.is_empty(), "{name}: no prose for {bare:?}");
}

#[test]
fn a_difference_is_seen() {
    let one = parse(
        "<!DOCTYPE x><node><interface name=\"i\"><!-- <method name=\"no\"/> --><method name=\"M\">
         <doc:doc><doc:para>text</doc:para></doc:doc><arg name=\"a\" type=\"s\"/></method></interface></node>",
    );
    for other in [
        "<node><interface name=\"i\"><method name=\"M\"><arg name=\"a\" type=\"u\" direction=\"in\"/></method></interface></node>",
        "<node><interface name=\"i\"><method name=\"M\"><arg name=\"b\" type=\"s\" direction=\"in\"/></method></interface></node>",
        "<node><interface name=\"i\"><method name=\"M\"/></interface></node>",
        "<node><interface name=\"i\"><method name=\"N\"><arg name=\"a\" type=\"s\"/></method></interface></node>",
    ] {
        assert_ne!(facts(&one, "i"), facts(&parse(other), "i"), "{other}");
    }
    let same = "<node><interface name='i'><method name='M'><arg type='s' name='a' direction='in'/></method></interface></node>";
    assert_eq!(facts(&one, "i"), facts(&parse(same), "i"));
}

#[tokio::test]
async fn states_reasons_and_errors_are_documented() {
    let (run, _) = documented("org.finetuned.Finetuned1.Run.xml");
    for state in crate::runs::State::ALL {
        assert!(run.contains(&format!("<doc:tt>{state}</doc:tt>")), "{state}");
    }
    let overview =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/dbus/README.md")).unwrap();
    for reason in crate::reason::Reason::ALL {
        assert!(overview.contains(&format!("| `{reason}` |")), "{reason}");
    }
    for action in crate::bus::authority::Action::ALL {
        assert!(overview.contains(&format!("`{}`", action.id())), "{action:?}");
    }
    // Every variant of the error type, from its source.
    let source = include_str!("../error.rs");
    let body = source.split("pub enum Error {").nth(1).unwrap().split("\n}").next().unwrap();
    let errors: Vec<&str> = body.lines().filter_map(|line| line.trim().strip_suffix("(String),")).collect();
    assert!(errors.len() > 10);
    for error in errors {
        assert!(overview.contains(&format!("| `{error}` |")), "{error}");
    }
}
