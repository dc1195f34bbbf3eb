//! What the model is fed.

/// Target of a position that is not learnt (the value PyTorch's `cross_entropy` ignores).
pub const IGNORE: i32 = -100;

/// One sequence: one example, or several packed without attention across them.
///
/// All vectors but `cu_seqlens` have one entry per token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// `targets[t]` is the token to predict at position `t` (already shifted: the next token of the same example),
    /// or [`IGNORE`]. The last position of every example is [`IGNORE`].
    pub targets: Vec<i32>,
    /// Position within the example: restarts at 0 with every example.
    pub positions: Vec<u32>,
    /// Offsets of the examples: starts with 0, ends with the number of tokens, strictly ascending.
    pub cu_seqlens: Vec<u32>,
}

impl Sequence {
    /// A sequence of one example. `mask[t]` says whether token `t` is learnt (position `t - 1` then predicts it);
    /// `mask[0]` has no position that could predict it and is ignored.
    pub fn single(tokens: &[u32], mask: &[bool]) -> Self {
        let mut sequence = Sequence { cu_seqlens: vec![0], ..Default::default() };
        sequence.push(tokens, mask);
        sequence
    }

    /// Appends one example (nothing when it is empty).
    pub fn push(&mut self, tokens: &[u32], mask: &[bool]) {
        assert_eq!(tokens.len(), mask.len());
        if tokens.is_empty() {
            return;
        }
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        self.tokens.extend_from_slice(tokens);
        for t in 0..tokens.len() {
            let learnt = t + 1 < tokens.len() && mask[t + 1];
            self.targets.push(if learnt { tokens[t + 1] as i32 } else { IGNORE });
            self.positions.push(t as u32);
        }
        self.cu_seqlens.push(self.tokens.len() as u32);
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Number of positions that have a target.
    pub fn labelled(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE).count()
    }
}
