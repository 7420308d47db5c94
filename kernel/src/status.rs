//! What a launch reports back: the status words in device memory, written by the kernel and read by the host.

use crate::layout::MAX_LAYERS;

/// Status words of one rank, in its workspace. All zero (but `bad_choice`, see [`NO_BAD_CHOICE`]) means a clean launch.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Status {
    /// 0, or the first wait that was in vain, as [`Timeout::pack`] writes it. While it is set, all waits fall through.
    pub timeout: u64,
    /// [`NO_BAD_CHOICE`], or the smallest [`BadChoice`] that routing met.
    pub bad_choice: u64,
    /// 0, or the token count that exceeded the maximum, with the layer in the upper half.
    pub excess_tokens: u64,
}

/// The value of [`Status::bad_choice`] when every expert id was good.
pub const NO_BAD_CHOICE: u64 = u64::MAX;

impl Status {
    /// The words before a launch.
    pub const CLEAR: Self = Self { timeout: 0, bad_choice: NO_BAD_CHOICE, excess_tokens: 0 };
}

/// What a wait was for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Dispatch: another rank's launch of the same layer. It has launched another one, and was not waited for.
    Layer = 1,
    /// Dispatch: the token counts of another rank.
    Counts = 2,
    /// Dispatch: the quantised tokens of another rank.
    Records = 3,
    /// Linear 1: the pulled rows of a tile.
    Rows = 4,
    /// Linear 2: the intermediate columns of a tile.
    Columns = 5,
    /// Dispatch: linear 2 of the tile whose rows are to be overwritten.
    Ring = 6,
    /// Combine: the results of an expert.
    Results = 7,
}

/// A wait that ran past the deadline, or that nothing will ever end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    /// What was waited for.
    pub stage: Stage,
    /// The rank that should have delivered it.
    pub rank: u32,
    /// The expert (global id) or, for [`Stage::Rows`], [`Stage::Columns`] and [`Stage::Ring`], the tile that was missing; 0 for [`Stage::Records`]; for [`Stage::Layer`] the layer
    /// that there was instead.
    pub subject: u32,
}

impl Timeout {
    /// The status word for this timeout of a launch of `layer`, below [`MAX_LAYERS`]; never 0.
    pub const fn pack(self, layer: u32) -> u64 {
        (self.stage as u64) << 56 | (layer as u64) << 40 | (self.rank as u64) << 32 | self.subject as u64
    }

    /// The timeout in a status word, with the layer; `None` for 0 and for words that [`Self::pack`] does not make.
    pub const fn unpack(word: u64) -> Option<(Self, u32)> {
        let stage = match word >> 56 {
            1 => Stage::Layer,
            2 => Stage::Counts,
            3 => Stage::Records,
            4 => Stage::Rows,
            5 => Stage::Columns,
            6 => Stage::Ring,
            7 => Stage::Results,
            _ => return None,
        };
        let timeout = Self { stage, rank: (word >> 32) as u32 & 0xff, subject: word as u32 };
        Some((timeout, (word >> 40) as u32 % MAX_LAYERS))
    }
}

/// What was wrong with an entry of the top-k ids.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The id is neither -1 nor an expert.
    OutOfRange = 0,
    /// The token names the expert a second time.
    Repeated = 1,
}

/// An entry of the top-k ids that routing masked. Packed words are ordered by layer, then by token, then by k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChoice {
    /// Number of the layer among those of its workspace, below [`MAX_LAYERS`].
    pub layer: u32,
    /// Index of the token on its rank.
    pub token: u32,
    /// Index among the token's choices.
    pub k: u32,
    /// What was wrong.
    pub fault: Fault,
}

impl BadChoice {
    /// The status word for this entry.
    pub const fn pack(self) -> u64 {
        (self.layer as u64) << 40 | (self.token as u64) << 16 | (self.k as u64) << 8 | self.fault as u64
    }

    /// The entry in a status word; `None` for [`NO_BAD_CHOICE`].
    pub const fn unpack(word: u64) -> Option<Self> {
        if word == NO_BAD_CHOICE {
            return None;
        }
        Some(Self {
            layer: (word >> 40) as u32,
            token: (word >> 16) as u32 & 0xff_ffff,
            k: (word >> 8) as u32 & 0xff,
            fault: if word & 0xff == 0 { Fault::OutOfRange } else { Fault::Repeated },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MAX_TOKENS;

    #[test]
    fn status_words_keep_what_was_packed() {
        let timeout = Timeout { stage: Stage::Results, rank: 7, subject: 383 };
        assert_eq!(Timeout::unpack(timeout.pack(MAX_LAYERS - 1)), Some((timeout, MAX_LAYERS - 1)));
        assert_eq!(Timeout::unpack(0), None);
        let choice = BadChoice { layer: MAX_LAYERS - 1, token: MAX_TOKENS as u32 - 1, k: 31, fault: Fault::Repeated };
        assert_eq!(BadChoice::unpack(choice.pack()), Some(choice));
        assert_eq!(BadChoice::unpack(NO_BAD_CHOICE), None);
    }
}
