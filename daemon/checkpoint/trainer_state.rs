//! trainer_state.json, as the Trainer of transformers writes it, for the tools that read it.
//!
//! The fields are those of `TrainerState` in `transformers/trainer_callback.py` (5.24; 4.5x has the same), written as
//! it writes them: keys sorted, indented by two, a line end at the end. `TrainerState.load_from_json` hands every key to
//! a constructor, so a key of our own would break it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Fields as transformers names them, in alphabetical order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Step of the best evaluation.
    pub best_global_step: Option<u64>,
    /// Lowest held-out loss.
    pub best_metric: Option<f64>,
    /// Path of the checkpoint taken at that step.
    pub best_model_checkpoint: Option<String>,
    /// Passes over the data completed, fractional.
    pub epoch: f64,
    /// Steps between evaluations.
    pub eval_steps: u64,
    /// Optimizer steps completed.
    pub global_step: u64,
    /// Always false: there is no hyperparameter search here.
    pub is_hyper_param_search: bool,
    /// Always true: there is one process.
    pub is_local_process_zero: bool,
    /// Always true: there is one process.
    pub is_world_process_zero: bool,
    /// One object for each step (`loss`, `grad_norm`, `learning_rate`, `epoch`, `step`) and each evaluation
    /// (`eval_loss`, `epoch`, `step`).
    pub log_history: Vec<Value>,
    /// Steps between entries of the history.
    pub logging_steps: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Tokens fed to the model in training.
    pub num_input_tokens_seen: u64,
    /// Passes over the data of the whole run, rounded up.
    pub num_train_epochs: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// State of the Trainer's callbacks; transformers writes that of its TrainerControl.
    pub stateful_callbacks: Value,
    /// Floating-point operations of training.
    pub total_flos: f64,
    /// Sequences of a micro-step.
    pub train_batch_size: Option<u64>,
    /// Always null: no hyperparameter search.
    pub trial_name: Option<String>,
    /// Always null: no hyperparameter search.
    pub trial_params: Option<Value>,
}

impl Default for TrainerState {
    fn default() -> Self {
        TrainerState {
            best_global_step: None,
            best_metric: None,
            best_model_checkpoint: None,
            epoch: 0.0,
            eval_steps: 500,
            global_step: 0,
            is_hyper_param_search: false,
            is_local_process_zero: true,
            is_world_process_zero: true,
            log_history: Vec::new(),
            logging_steps: 1,
            max_steps: 0,
            num_input_tokens_seen: 0,
            num_train_epochs: 0,
            save_steps: 500,
            stateful_callbacks: json!({"TrainerControl": {
                "args": {
                    "should_epoch_stop": false,
                    "should_evaluate": false,
                    "should_log": false,
                    "should_save": true,
                    "should_training_stop": false,
                },
                "attributes": {},
            }}),
            total_flos: 0.0,
            train_batch_size: None,
            trial_name: None,
            trial_params: None,
        }
    }
}

impl TrainerState {
    /// The text of trainer_state.json. Floats that JSON cannot hold become null.
    pub fn to_json(&self) -> String {
        // A struct of JSON types always serialises.
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value.sort_all_objects();
        format!("{value:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_fields_of_transformers_sorted() {
        let state = TrainerState {
            log_history: vec![json!({"step": 1, "loss": 2.5, "epoch": 0.5})],
            best_metric: Some(0.1 + 0.2),
            ..TrainerState::default()
        };
        let text = state.to_json();
        let keys: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("  \"")?.split_once('"').map(|(key, _)| key))
            .collect();
        assert_eq!(
            keys,
            [
                "best_global_step",
                "best_metric",
                "best_model_checkpoint",
                "epoch",
                "eval_steps",
                "global_step",
                "is_hyper_param_search",
                "is_local_process_zero",
                "is_world_process_zero",
                "log_history",
                "logging_steps",
                "max_steps",
                "num_input_tokens_seen",
                "num_train_epochs",
                "save_steps",
                "stateful_callbacks",
                "total_flos",
                "train_batch_size",
                "trial_name",
                "trial_params",
            ]
        );
        assert!(text.ends_with("}\n"));
        let entry = text.find("\"epoch\": 0.5").unwrap();
        assert!(entry < text.find("\"loss\": 2.5").unwrap(), "nested keys are sorted too");
        assert_eq!(serde_json::from_str::<TrainerState>(&text).unwrap(), state);
    }
}
