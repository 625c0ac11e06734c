//! Mutexes whose data is plain: a thread that panicked while it held one left nothing half done.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex; a thread that panicked while it held it left plain data behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
