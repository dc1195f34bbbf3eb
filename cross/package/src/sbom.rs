//! The bill of materials: CycloneDX 1.5, <https://cyclonedx.org/docs/1.5/json/>.

use crate::crates::{Crate, Crates};
use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The document, with a final line feed.
pub fn cyclonedx(crates: &Crates, at: Timestamp, rustc: &str) -> String {
    let all = || std::iter::once(&crates.root).chain(&crates.others);
    let dependencies: Vec<Value> = all()
        .map(|one| {
            let needs: Vec<String> =
                one.needs.iter().map(|(name, version)| reference(name, version)).collect();
            json!({"ref": reference(&one.name, &one.version), "dependsOn": needs})
        })
        .collect();
    let mut root = component(&crates.root);
    root["type"] = "application".into();
    let mut document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": "",
        "version": 1,
        "metadata": {
            "timestamp": at.to_string(),
            "tools": {"components": [
                {"type": "application", "name": "rustc", "version": rustc.trim().trim_start_matches("rustc ")},
            ]},
            "component": root,
        },
        "components": crates.others.iter().map(component).collect::<Vec<_>>(),
        "dependencies": dependencies,
    });
    document["serialNumber"] = serial(&document.to_string()).into();
    // A Value has no form that cannot be written.
    serde_json::to_string_pretty(&document).unwrap_or_default() + "\n"
}

fn reference(name: &str, version: &str) -> String {
    format!("pkg:cargo/{name}@{version}")
}

fn component(one: &Crate) -> Value {
    let reference = reference(&one.name, &one.version);
    let mut component = json!({
        "type": "library",
        "bom-ref": reference,
        "name": one.name,
        "version": one.version,
        "licenses": [{"expression": one.licence}],
        "purl": reference,
    });
    if let Some(checksum) = &one.checksum {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    if let Some(repository) = &one.repository {
        component["externalReferences"] = json!([{"type": "vcs", "url": repository}]);
    }
    component
}

/// A UUID of the document's own content (RFC 9562, version 8), so that the same source gives the same document.
fn serial(document: &str) -> String {
    let mut bytes: [u8; 16] = std::array::from_fn({
        let digest = Sha256::digest(document.as_bytes());
        move |i| digest[i]
    });
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("urn:uuid:{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_with_its_licence_and_checksum() {
        let crates = crate::crates::tests::example();
        let text = cyclonedx(&crates, Timestamp::UNIX_EPOCH, "rustc 1.95.0 (abc)");
        assert_eq!(text, cyclonedx(&crates, Timestamp::UNIX_EPOCH, "rustc 1.95.0 (abc)"));
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["metadata"]["timestamp"], "1970-01-01T00:00:00Z");
        assert_eq!(document["metadata"]["component"]["purl"], "pkg:cargo/finetuned@1.0.0");
        assert_eq!(document["metadata"]["tools"]["components"][0]["version"], "1.95.0 (abc)");
        assert_eq!(document["components"][1]["hashes"][0]["content"], "bb");
        assert_eq!(document["components"][1]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(document["dependencies"][1]["dependsOn"][0], "pkg:cargo/beta@1.0.0");
        let serial = document["serialNumber"].as_str().unwrap();
        assert!(serial.len() == 45 && serial.as_bytes()[23] == b'8', "{serial}");
        assert_ne!(
            text,
            cyclonedx(&crates, Timestamp::from_second(86_400).unwrap(), "rustc 1.95.0 (abc)"),
            "another content has another number"
        );
    }
}
