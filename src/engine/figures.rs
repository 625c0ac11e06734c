//! Figures for the status.

/// WAL figures for status.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WalFigures {
    pub(crate) locks_lost: u64,
    pub(crate) frames: u32,
    pub(crate) backfilled: u32,
}
