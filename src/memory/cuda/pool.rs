//! Things that take long to make and are used by one thread at a time.

use parking_lot::{Condvar, Mutex};

/// At most `most` things, made as they are asked for and kept.
#[derive(Debug)]
pub(super) struct Pool<T> {
    state: Mutex<State<T>>,
    returned: Condvar,
    most: usize,
}

#[derive(Debug)]
struct State<T> {
    free: Vec<T>,
    made: usize,
}

impl<T> Pool<T> {
    pub fn new(most: usize) -> Pool<T> {
        Pool { state: Mutex::new(State { free: Vec::new(), made: 0 }), returned: Condvar::new(), most }
    }

    /// One that is free, a new one, or the next that is given back. Whoever holds one must not wait for another.
    pub fn take<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        {
            let mut state = self.state.lock();
            loop {
                if let Some(free) = state.free.pop() {
                    return Ok(free);
                }
                if state.made < self.most {
                    state.made += 1;
                    break;
                }
                self.returned.wait(&mut state);
            }
        }
        // Made without the lock, which whoever gives one back needs.
        let made = make();
        if made.is_err() {
            self.state.lock().made -= 1;
            self.returned.notify_one();
        }
        made
    }

    pub fn give_back(&self, one: T) {
        self.state.lock().free.push(one);
        self.returned.notify_one();
    }

    /// How many there are, in use or free.
    pub fn made(&self) -> usize {
        self.state.lock().made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn what_was_given_back_is_used_again() {
        let pool = Pool::new(2);
        let a = pool.take(|| Ok::<_, ()>('a')).unwrap();
        pool.give_back(a);
        assert_eq!(pool.take(|| Err(())), Ok('a'));
        assert_eq!(pool.take(|| Ok::<_, ()>('b')), Ok('b'));
        assert_eq!(pool.made(), 2);
    }

    #[test]
    fn many_threads_share_few_and_each_has_its_own() {
        const THREADS: usize = 12;
        let (pool, made) = (Pool::new(3), AtomicUsize::new(0));
        let in_use: [AtomicUsize; 3] = Default::default();
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let one = pool.take(|| Ok::<_, ()>(made.fetch_add(1, Ordering::Relaxed))).unwrap();
                        assert_eq!(in_use[one].fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        in_use[one].fetch_sub(1, Ordering::SeqCst);
                        pool.give_back(one);
                    }
                });
            }
        });
        assert!(pool.made() <= 3 && pool.made() == made.into_inner());
    }

    #[test]
    fn one_that_could_not_be_made_leaves_room_for_whoever_waits() {
        let pool = Pool::new(1);
        assert_eq!(pool.take(|| Err::<u8, _>("no memory")), Err("no memory"));
        assert_eq!(pool.take(|| Ok::<_, ()>(5)), Ok(5));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.take(|| Ok::<_, ()>(6)));
            pool.give_back(5);
            assert_eq!(waiting.join().unwrap(), Ok(5));
        });
    }
}
