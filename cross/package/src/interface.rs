//! An introspection file with its prose as roff: every method, signal and property with its signature.

use crate::roff::{Roff, bold, code, escape, italic};
use anyhow::{Context, Result};
use roxmltree::{Document, Node, ParsingOptions};

/// Appends the interfaces of the file.
pub fn write(xml: &str, roff: &mut Roff) -> Result<()> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options)?;
    for interface in elements(document.root_element(), "interface") {
        let name = attribute(interface, "name")?;
        let short = name.strip_prefix("org.finetuned.Finetuned1.").unwrap_or(name);
        roff.request("SH", &[&format!("INTERFACE {}", short.to_uppercase())]);
        roff.line(&bold(&code(name)));
        prose(interface, roff);
        for member in interface.children().filter(Node::is_element) {
            match member.tag_name().name() {
                "method" => callable(member, "", roff)?,
                "signal" => callable(member, "signal ", roff)?,
                "property" => property(member, roff)?,
                _ => {}
            }
        }
    }
    Ok(())
}

fn elements<'a>(node: Node<'a, 'a>, name: &'a str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn attribute<'a>(node: Node<'a, 'a>, name: &str) -> Result<&'a str> {
    node.attribute(name).with_context(|| format!("<{}> without {name}", node.tag_name().name()))
}

/// `Name(in type, …) → out type, …`, the prose, and the arguments.
fn callable(member: Node<'_, '_>, kind: &str, roff: &mut Roff) -> Result<()> {
    let name = attribute(member, "name")?;
    let arguments: Vec<_> = member.children().filter(|child| child.has_tag_name("arg")).collect();
    let signature = |out: bool| -> Result<Vec<String>> {
        let mut parts = Vec::new();
        for argument in &arguments {
            // The arguments of a signal have no direction and go out, to those who listen.
            let goes_out = argument.attribute("direction") == Some("out");
            if goes_out == out {
                let name = argument.attribute("name").unwrap_or_default();
                parts.push(format!(
                    "{} {}",
                    code(argument.attribute("type").unwrap_or("?")),
                    italic(&code(name))
                ));
            }
        }
        Ok(parts)
    };
    roff.request("SS", &[&format!("{kind}{name}")]);
    let answer = signature(true)?;
    let arrow = if answer.is_empty() { String::new() } else { format!(" \\(-> {}", answer.join(", ")) };
    roff.line(&format!("{}({}){arrow}", bold(&code(name)), signature(false)?.join(", ")));
    prose(member, roff);
    for argument in arguments {
        let summary = text_of(argument);
        if !summary.is_empty() {
            roff.raw(".TP");
            roff.line(&italic(&code(argument.attribute("name").unwrap_or_default())));
            roff.line(&summary);
        }
    }
    Ok(())
}

fn property(member: Node<'_, '_>, roff: &mut Roff) -> Result<()> {
    let (name, kind) = (attribute(member, "name")?, attribute(member, "type")?);
    let access = attribute(member, "access")?;
    let changed = elements_named(member, "annotation")
        .find(|node| node.attribute("name") == Some("org.freedesktop.DBus.Property.EmitsChangedSignal"))
        .and_then(|node| node.attribute("value"));
    let changed = match changed {
        Some("const") => "; never changes",
        Some("false") => "; changes without a signal",
        _ => "",
    };
    roff.request("SS", &[&format!("property {name}")]);
    roff.line(&format!("{} {} ({}{changed})", code(kind), bold(&code(name)), escape(access)));
    prose(member, roff);
    Ok(())
}

fn elements_named<'a, 'b: 'a>(node: Node<'a, 'b>, name: &'static str) -> impl Iterator<Item = Node<'a, 'b>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

/// The paragraphs of an element's own documentation.
fn prose(node: Node<'_, '_>, roff: &mut Roff) {
    let documentation = node.children().filter(|child| child.tag_name().name() == "doc");
    for paragraph in
        documentation.flat_map(|doc| doc.descendants()).filter(|node| node.tag_name().name() == "para")
    {
        roff.raw(".PP");
        roff.line(&inline(paragraph));
    }
}

/// The summary of an argument.
fn text_of(node: Node<'_, '_>) -> String {
    let summary = node.descendants().find(|node| node.tag_name().name() == "summary");
    summary.map(inline).unwrap_or_default()
}

/// The text of an element, `<tt>` in bold, in one line.
fn inline(node: Node<'_, '_>) -> String {
    let mut line = String::new();
    for child in node.children() {
        if child.is_text() {
            line.push_str(&escape(child.text().unwrap_or_default()));
        } else if child.tag_name().name() == "tt" {
            line.push_str(&bold(&code(child.text().unwrap_or_default())));
        } else if child.is_element() {
            line.push_str(&inline(child));
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_and_a_property() {
        let mut roff = Roff::default();
        let xml = r#"<node xmlns:doc="http://www.freedesktop.org/dbus/1.0/doc.dtd"><interface name="org.finetuned.Finetuned1.Run">
            <method name="Wait"><doc:doc><doc:description><doc:para>Answers at
            the <doc:tt>end</doc:tt>.</doc:para></doc:description></doc:doc>
            <arg name="options" type="a{sv}" direction="in"/><arg name="state" type="s" direction="out">
            <doc:doc><doc:summary>How.</doc:summary></doc:doc></arg></method>
            <property name="Id" type="s" access="read">
            <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/></property>
            </interface></node>"#;
        write(xml, &mut roff).unwrap();
        assert_eq!(
            roff.into_text(),
            ".SH \"INTERFACE RUN\"\n\\fBorg.finetuned.Finetuned1.Run\\fR\n.SS \"Wait\"\n\\fBWait\\fR(a{sv} \
             \\fIoptions\\fR) \\(-> s \\fIstate\\fR\n.PP\nAnswers at the \\fBend\\fR.\n.TP\n\\fIstate\\fR\nHow.\n.SS \
             \"property Id\"\ns \\fBId\\fR (read; never changes)\n"
        );
    }
}
