//! Rows of the embedding and the gradient that comes back to them (see `cpu::embedding`): a matrix of the rows that were
//! looked up alone.

use super::{Gpu, Part, Result, Weight, blocks, kernels, launch};

kernels!("embedding");

const BLOCK: u32 = 256;

/// `x (rows x H, f32)` = rows `ids` (i32, each below the table's rows: the caller checked) of the table.
pub fn forward(gpu: &Gpu, table: &Weight, ids: Part, rows: usize, x: Part) -> Result<()> {
    launch!(gpu, "embedding_forward", (blocks(rows, 1), 1, 1), (BLOCK, 1, 1), 0;
        table.address, table.number(), table.stride as i64, ids.holds(rows, 4), table.columns as i32,
        x.f32(rows * table.columns));
    Ok(())
}

/// The rows of a batch by the token that they looked up.
pub struct Lookups {
    /// Tokens that occur, ascending.
    pub ids: Vec<i32>,
    /// Where the rows of each begin in `rows`, and their end.
    starts: Vec<i32>,
    /// Rows in the order of the batch, token by token.
    rows: Vec<i32>,
}

impl Lookups {
    pub fn new(ids: &[u32]) -> Lookups {
        let mut rows: Vec<i32> = (0..ids.len() as i32).collect();
        rows.sort_by_key(|&r| ids[r as usize]); // stable: in the order of the batch
        let (mut unique, mut starts) = (Vec::new(), Vec::new());
        for (i, &r) in rows.iter().enumerate() {
            let id = ids[r as usize] as i32;
            if unique.last() != Some(&id) {
                unique.push(id);
                starts.push(i as i32);
            }
        }
        starts.push(rows.len() as i32);
        Lookups { ids: unique, starts, rows }
    }
}

/// `out (tokens x H, f32)` = sums of the rows of `dx (rows x H, f32)` that looked each token up, in order.
pub fn backward(gpu: &Gpu, dx: Part, lookups: &Lookups, h: usize, out: Part) -> Result<()> {
    let (starts, rows) = (gpu.upload(&lookups.starts)?, gpu.upload(&lookups.rows)?);
    launch!(gpu, "embedding_backward", (blocks(lookups.ids.len(), 1), 1, 1), (BLOCK, 1, 1), 0;
        dx.f32(lookups.rows.len() * h), starts.part().address, rows.part().address, h as i32,
        out.f32(lookups.ids.len() * h));
    Ok(())
}

/// Adds those sums to rows `first..first + rows` of a gradient `g (bf16)`; `ids` (i32) are the tokens.
#[allow(clippy::too_many_arguments)]
pub fn add(
    gpu: &Gpu,
    sums: Part,
    ids: Part,
    tokens: usize,
    h: usize,
    first: usize,
    rows: usize,
    g: Part,
) -> Result<()> {
    launch!(gpu, "embedding_add", (blocks(tokens, 1), 1, 1), (BLOCK, 1, 1), 0;
        sums.f32(tokens * h), ids.holds(tokens, 4), first as i32, rows as i32, h as i32, g.bf16(rows * h));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_token_in_their_order() {
        let l = Lookups::new(&[7, 3, 7, 0, 3, 7]);
        assert_eq!((l.ids, l.starts, l.rows), (vec![0, 3, 7], vec![0, 1, 3, 6], vec![3, 1, 4, 0, 2, 5]));
        let none = Lookups::new(&[]);
        assert_eq!((none.ids, none.starts), (vec![], vec![0]));
    }
}
