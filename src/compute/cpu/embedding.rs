//! Looking rows of the embedding up, and the gradient that comes back to them.

/// `dw += the rows of dx (T x H) that fell on rows first..first + dw.len() / H` of the embedding. In order of T.
pub fn backward_rows(ids: &[u32], dx: &[f32], dw: &mut [f32], hidden: usize, first: usize) {
    assert_eq!(dx.len(), ids.len() * hidden);
    let rows = first..first + dw.len() / hidden;
    for (id, dx) in ids.iter().zip(dx.chunks_exact(hidden)) {
        let id = *id as usize;
        if rows.contains(&id) {
            let at = (id - first) * hidden;
            for (d, x) in dw[at..at + hidden].iter_mut().zip(dx) {
                *d += x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_occur_twice_add_up_and_others_are_left() {
        let dx = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0];
        let mut dw = [0.5; 4];
        backward_rows(&[3, 1, 3], &dx, &mut dw, 2, 2);
        assert_eq!(dw, [0.5, 0.5, 101.5, 202.5]);
    }
}
