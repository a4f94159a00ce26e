//! Buffers that go back where they came from. A pass makes and drops hundreds of matrices of a few sizes; from the system
//! each would come as fresh pages, cleared one by one, and leave holes behind. From here they come as they were left.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Free buffers by size.
#[derive(Debug, Default, Clone)]
pub struct Pool(Arc<Mutex<BTreeMap<usize, Vec<Vec<f32>>>>>);

/// A slice of f32 that its pool gets back.
#[derive(Debug)]
pub struct Buffer {
    values: Vec<f32>,
    pool: Pool,
}

impl Pool {
    /// A buffer of whatever values were there: for results that are written whole.
    pub fn take(&self, len: usize) -> Buffer {
        let mut free = self.0.lock();
        // The smallest that fits, unless it would waste more than it holds.
        let fitting = free.range(len..=len.saturating_mul(2)).find(|(_, list)| !list.is_empty()).map(|(&size, _)| size);
        let found = fitting.and_then(|size| free.get_mut(&size)?.pop());
        drop(free);
        let mut values = found.unwrap_or_else(|| vec![0.0; len]);
        values.truncate(len);
        Buffer { values, pool: self.clone() }
    }

    /// A buffer of zeros: for results that are added up.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    pub fn copy(&self, values: &[f32]) -> Buffer {
        let mut buffer = self.take(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Gives free buffers back to the system until they were `bytes`, the largest first: room for other sizes.
    pub fn release(&self, bytes: usize) {
        let (mut free, mut released) = (self.0.lock(), 0);
        while released < bytes
            && let Some(mut last) = free.last_entry()
        {
            match last.get_mut().pop() {
                Some(buffer) => released += 4 * buffer.len(),
                None => drop(last.remove()),
            }
        }
        drop(free);
        trim();
    }

    /// Gives all free buffers back to the system, when other sizes are coming.
    pub fn clear(&self) {
        self.0.lock().clear();
        trim();
    }
}

impl Buffer {
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Another of this size, from the same pool, of whatever values were there.
    pub fn like(&self) -> Buffer {
        self.pool.take(self.len())
    }
}

/// Asks the allocator to give free pages back: glibc keeps those below its newest allocation for itself.
fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` may be called at any time from any thread; it touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut values = std::mem::take(&mut self.values);
        // All of its capacity was written once, so that growing back costs a fill at most.
        let capacity = values.capacity();
        values.resize(capacity, 0.0);
        if capacity > 0 {
            self.pool.0.lock().entry(capacity).or_default().push(values);
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_to_those_that_ask_for_its_size() {
        let pool = Pool::default();
        let mut a = pool.take(100);
        a.fill(7.0);
        let address = a.as_ptr();
        drop(a);
        let b = pool.take(60);
        assert_eq!((b.as_ptr(), b.len(), b[59]), (address, 60, 7.0));
        assert_ne!(pool.take(60).as_ptr(), address, "it is taken");
        drop(b);
        assert_eq!(pool.zeros(100).iter().sum::<f32>(), 0.0);
        assert_ne!(pool.take(40).as_ptr(), address, "too large for that");
        drop(pool.take(3000));
        pool.release(2000);
        assert!(pool.0.lock().contains_key(&100) && pool.0.lock()[&3000].is_empty());
        pool.release(usize::MAX);
        assert!(pool.0.lock().is_empty());
    }
}
