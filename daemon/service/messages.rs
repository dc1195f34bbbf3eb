//! The events that have a name in the journal: a 128-bit id each, as `MESSAGE_ID=`, so that a program can wait for one
//! (`journalctl MESSAGE_ID=…`) and a person can ask what it means (`journalctl -x`, `systemd/finetuned.catalog`).
//!
//! An id is drawn at random once and never changes or moves to another event. Ids are for what an operator acts on;
//! everything else is logged without.

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $id:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $id;)*

        /// Every id.
        #[cfg(test)]
        const ALL: &[(&str, &str)] = &[$((stringify!($name), $id),)*];
    };
}

messages! {
    /// The daemon serves.
    DAEMON_STARTED = "c38763814f9d79ac962d8aa15e1d1cda";
    /// The daemon was told to end, and saves.
    DAEMON_STOPPING = "973e502352c6ce2febc0029014ea955b";
    /// A run was submitted.
    RUN_SUBMITTED = "7f561042f6ce9e121c07db63ff17776b";
    /// An attempt of a run has begun.
    RUN_STARTED = "33667f30c5a029a37f48edc64f043d01";
    /// A run is complete.
    RUN_SUCCEEDED = "79770b94528247fce7087adae6e825a8";
    /// A run ended without a result.
    RUN_FAILED = "5925c2009d1315b2d3df2b52edd0739f";
    /// A run was ended by a person.
    RUN_CANCELLED = "d6f69972b3a512caf1a19f48a5057eb3";
    /// A run was stopped by a person, and can go on.
    RUN_PAUSED = "6d517ffaf116d05825a30fd80d258672";
    /// Something stands in a run's way.
    RUN_WAITING = "50787c93d1ba5dd9969e2477ea9ee3ed";
    /// A worker is gone without having been told to go.
    WORKER_LOST = "96b208670912eb83780f722c3486b346";
    /// A checkpoint is durable.
    CHECKPOINT_WRITTEN = "cfde6552ac8f2e36b49953ff8490a0ae";
    /// Somebody holds all training.
    INHIBITOR_TAKEN = "bde284f467a0f78d03abd73a3e0019ac";
    /// A hold has ended.
    INHIBITOR_RELEASED = "cfb5a43a2b92f2b9df69fe1c295880be";
    /// The machine sleeps or goes down before what trains is saved.
    NOT_SAVED_IN_TIME = "61ec433f879c5b9b78a945cec4d515a1";
    /// The configuration has mistakes.
    CONFIGURATION_REFUSED = "60a2e379788eb59812fd0623bf042bf8";
    /// A key of the budget was changed over the bus.
    BUDGET_CHANGED = "c69662488a338864ec5e0ab6c56ee043";
    /// What was set over the bus earlier cannot be read, or does not go with the files.
    SETTINGS_LOST = "72e6d14963c04ce60c361b04adbdddb9";
    /// A run will not be done by its deadline.
    DEADLINE_AT_RISK = "fa3188a3d1621a78fb9e4da78e2838fa";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_128_bits_and_distinct() {
        for (i, (name, id)) in ALL.iter().enumerate() {
            assert!(id.len() == 32 && id.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')), "{name}");
            assert!(ALL[..i].iter().all(|(_, other)| other != id), "{name}");
        }
    }

    /// The format is that of <https://systemd.io/CATALOG>: `-- id`, headers, an empty line, the text.
    #[test]
    fn the_catalogue_explains_every_id_and_no_other() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/finetuned.catalog"))
            .unwrap();
        let mut explained = Vec::new();
        for entry in text.split("\n-- ").skip(1) {
            let (id, rest) = entry.split_once('\n').unwrap();
            let (headers, body) = rest.split_once("\n\n").unwrap();
            assert!(headers.lines().any(|line| line.starts_with("Subject: ")), "{id}");
            assert!(headers.lines().any(|line| line == "Defined-By: finetuned"), "{id}");
            assert!(body.split_whitespace().count() > 10, "{id} says nothing: {body}");
            // Only what the events carry can be filled in.
            for field in body.split('@').skip(1).step_by(2).chain(headers.split('@').skip(1).step_by(2)) {
                assert!(
                    ["RUN_ID", "STEP", "REASON", "WHO", "WHY", "STATE"].contains(&field),
                    "{id}: {field}"
                );
            }
            explained.push(id.to_string());
        }
        let mut known: Vec<String> = ALL.iter().map(|(_, id)| id.to_string()).collect();
        explained.sort();
        known.sort();
        assert_eq!(explained, known);
    }
}
