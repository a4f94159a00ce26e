//! Do the segments of a tensor, over all ranks, hold each of its elements exactly once? Boxes that several ranks hold
//! alike are replicas: one of them is read, all are written.

use super::Segment;

/// `segments` with their rank, each inside the tensor. Returns them with replicas marked.
pub(super) fn check(tensor: &[u64], mut segments: Vec<(usize, Segment)>) -> Result<Vec<Segment>, String> {
    segments.sort_by(|(ra, a), (rb, b)| (&a.at, &a.shape, ra).cmp(&(&b.at, &b.shape, rb)));
    let mut boxes: Vec<(usize, Segment)> = Vec::with_capacity(segments.len());
    let mut replicas = Vec::new();
    for (rank, segment) in segments {
        match boxes.last() {
            Some((first, b)) if b.at == segment.at && b.shape == segment.shape => {
                if rank == *first {
                    return Err(twice(&segment));
                }
                replicas.push((rank, Segment { replica: true, ..segment }));
            }
            _ => boxes.push((rank, segment)),
        }
    }
    // One rank must not name one box twice among its replicas either.
    for pair in replicas.windows(2) {
        if pair[0].0 == pair[1].0 && pair[0].1.at == pair[1].1.at && pair[0].1.shape == pair[1].1.shape {
            return Err(twice(&pair[1].1));
        }
    }
    disjoint(&boxes)?;
    let volume = |shape: &[u64]| shape.iter().map(|&d| d as u128).product::<u128>();
    let held: u128 = boxes.iter().map(|(_, b)| volume(&b.shape)).sum();
    if held != volume(tensor) {
        return Err(format!("its segments hold {held} of its {} elements", volume(tensor)));
    }
    Ok(boxes.into_iter().chain(replicas).map(|(_, s)| s).collect())
}

fn twice(segment: &Segment) -> String {
    format!("its elements at {:?} of shape {:?} are held by two segments", segment.at, segment.shape)
}

/// `boxes` are sorted by where they start, so that only those that start before one ends can meet it.
fn disjoint(boxes: &[(usize, Segment)]) -> Result<(), String> {
    for (i, (_, a)) in boxes.iter().enumerate() {
        for (_, b) in &boxes[i + 1..] {
            if !a.at.is_empty() && b.at[0] >= a.at[0] + a.shape[0] {
                break;
            }
            let apart = (0..a.at.len()).any(|d| a.at[d] + a.shape[d] <= b.at[d] || b.at[d] + b.shape[d] <= a.at[d]);
            if !apart {
                return Err(twice(b));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dtype;

    fn segment(at: &[u64], shape: &[u64]) -> Segment {
        let strides = super::super::row_major(shape);
        Segment { memory: 0, offset: 0, at: at.into(), shape: shape.into(), strides, dtype: Dtype::U8, replica: false }
    }

    #[test]
    fn pieces_that_tile_the_tensor_are_accepted() {
        let pieces =
            vec![(0, segment(&[0, 0], &[2, 4])), (0, segment(&[2, 0], &[2, 3])), (1, segment(&[2, 3], &[2, 1]))];
        let checked = check(&[4, 4], pieces).unwrap();
        assert!(checked.iter().all(|s| !s.replica));
        assert_eq!(check(&[], vec![(0, segment(&[], &[]))]).unwrap().len(), 1);
    }

    #[test]
    fn one_box_on_several_ranks_is_a_replica_and_on_one_rank_an_error() {
        let on = |ranks: &[usize]| check(&[4], ranks.iter().map(|&r| (r, segment(&[0], &[4]))).collect());
        assert_eq!(on(&[2, 0, 1]).unwrap().iter().filter(|s| s.replica).count(), 2);
        assert!(on(&[0, 0]).unwrap_err().contains("two segments"));
        assert!(on(&[0, 1, 1]).unwrap_err().contains("two segments"));
    }

    #[test]
    fn holes_and_overlaps_are_named() {
        let hole = check(&[4], vec![(0, segment(&[0], &[3]))]).unwrap_err();
        assert!(hole.contains("3 of its 4"), "{hole}");
        let overlap = check(&[4], vec![(0, segment(&[0], &[3])), (1, segment(&[2], &[2]))]).unwrap_err();
        assert!(overlap.contains("two segments"), "{overlap}");
    }
}
