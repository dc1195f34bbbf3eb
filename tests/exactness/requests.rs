//! What is asked of a run between its micro-steps: checkpoints and evaluations. They must not change a bit.

use super::fixture::{Bits, Fixture, expected, shared};
use finetuned::backend::philox::Philox;
use finetuned::train::gate::{Gate, Pace, Request};
use finetuned::train::observer::Event;
use finetuned::train::run::Outcome;
use std::path::Path;
use std::time::Duration;

/// The finest split: a micro-step a sequence.
const FINEST: [&str; 2] = ["train.micro_batch_size=1", "train.gradient_accumulation_steps=8"];

/// Before every piece of work none, one or several requests; sometimes it is closed for a moment.
struct Asks {
    random: Philox,
    next: u64,
}

impl Gate for Asks {
    fn pace(&mut self) -> Pace {
        if self.random.next_u32().is_multiple_of(4) {
            Pace::Wait(Duration::from_micros(10))
        } else {
            Pace::Run
        }
    }

    fn request(&mut self) -> Option<Request> {
        let request = match self.random.next_u32() % 8 {
            0 | 1 => Request::Checkpoint(self.next),
            2 => Request::Evaluate(self.next),
            _ => return None,
        };
        self.next += 1;
        Some(request)
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// What was answered.
#[derive(Default)]
struct Answers {
    evaluated: Vec<(u64, u64, f64)>,
    committed: Vec<(u64, u64, u64)>,
    refused: Vec<(u64, String)>,
    of_its_own: Vec<(u64, f64)>,
}

impl Answers {
    fn note(&mut self, event: &Event) {
        match event {
            Event::Evaluated { record: r, request: Some(request) } => {
                self.evaluated.push((*request, r.step, r.eval_loss));
            }
            Event::Evaluated { record: r, request: None } => self.of_its_own.push((r.step, r.eval_loss)),
            Event::Committed { step, within, request: Some(request), .. } => {
                self.committed.push((*request, *step, *within));
            }
            Event::Refused { request, why } => self.refused.push((*request, why.clone())),
            _ => {}
        }
    }
}

fn run(fixture: &Fixture, seed: u64, output: &Path, overrides: &[&str], copies: Option<&Path>) -> Answers {
    let mut answers = Answers::default();
    let mut gate = Asks { random: Philox::new(seed, 0), next: 0 };
    let overrides: Vec<&str> = FINEST.into_iter().chain(overrides.iter().copied()).collect();
    let mut observer = |event: Event| {
        answers.note(&event);
        if let (Event::Committed { request: Some(request), .. }, Some(copies)) = (&event, copies)
            && request % 7 == 0
        {
            copy(output, &copies.join(request.to_string()));
        }
    };
    let outcome = fixture.run(&fixture.spec(&overrides), output, false, &mut gate, &mut observer);
    assert!(matches!(outcome, Ok(Outcome::Finished { .. })), "{outcome:?}");
    answers
}

#[test]
fn asked_for_at_every_micro_step() {
    for seed in 0..3 {
        let (output, copies) = (shared().output(), shared().output());
        let answers = run(shared(), seed, output.path(), &[], Some(copies.path()));
        assert_eq!(&Bits::of(output.path()), expected(), "seed {seed}");
        // It was asked for at all kinds of places, and answered.
        assert!(answers.evaluated.len() > 5, "{} evaluations", answers.evaluated.len());
        assert!(answers.committed.iter().filter(|(.., within)| *within > 0).count() > 5);
        assert!(answers.refused.is_empty());
        // An evaluation between two steps finds what the run's own finds.
        let same = |(_, step, loss): &&(u64, u64, f64)| answers.of_its_own.contains(&(*step, *loss));
        assert!(answers.evaluated.iter().filter(same).count() > 0);
        assert!(
            answers.evaluated.iter().any(|(_, step, _)| !answers.of_its_own.iter().any(|o| o.0 == *step))
        );
        // A kill after such a checkpoint loses nothing.
        let mut resumed = 0;
        for entry in std::fs::read_dir(copies.path()).unwrap() {
            let copy = entry.unwrap().path();
            shared().finish(&shared().spec(&[]), &copy, true);
            assert_eq!(&Bits::of(&copy), expected(), "resumed from {}", copy.display());
            resumed += 1;
        }
        assert!(resumed > 0);
    }
}

#[test]
fn without_held_out_rows_an_evaluation_is_refused() {
    let output = shared().output();
    let answers = run(shared(), 5, output.path(), &["data.eval_fraction=0.0"], None);
    assert!(answers.evaluated.is_empty() && answers.of_its_own.is_empty());
    assert!(answers.refused.len() > 3);
    assert!(answers.refused[0].1.contains("data.eval"), "{}", answers.refused[0].1);
}
