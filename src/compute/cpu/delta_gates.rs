//! The two gates of a Gated DeltaNet head and token, in f32 whatever the weights are (Yang et al., arXiv 2412.06464):
//! how much is learnt, `beta = sigmoid(b)`, and the logarithm of what is kept, `g = -exp(A_log) softplus(a + dt_bias)`.
//! Layout of a, b, beta and g: T x heads.

/// `ln(1 + e^x)`; above 20, where f32 cannot tell them apart, x itself, as PyTorch does.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

pub fn forward(a: &[f32], b: &[f32], a_log: &[f32], dt_bias: &[f32], g: &mut [f32], beta: &mut [f32]) {
    let heads = a_log.len();
    assert_eq!((a.len(), b.len(), g.len(), dt_bias.len()), (beta.len(), beta.len(), beta.len(), heads));
    for (row, g) in a.chunks_exact(heads).zip(g.chunks_exact_mut(heads)) {
        for h in 0..heads {
            g[h] = -a_log[h].exp() * softplus(row[h] + dt_bias[h]);
        }
    }
    for (beta, &b) in beta.iter_mut().zip(b) {
        *beta = sigmoid(b);
    }
}

/// `dg` and `dbeta` are (heads, T). In place: `a` becomes `da`, `b` becomes `db`; `d_a_log += ...`, `d_dt_bias += ...`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dg: &[f32],
    dbeta: &[f32],
    a: &mut [f32],
    b: &mut [f32],
    a_log: &[f32],
    dt_bias: &[f32],
    d_a_log: &mut [f32],
    d_dt_bias: &mut [f32],
) {
    let (heads, rows) = (a_log.len(), a.len() / a_log.len());
    assert_eq!((dg.len(), dbeta.len(), b.len()), (a.len(), a.len(), a.len()));
    for h in 0..heads {
        let keep = -a_log[h].exp();
        // Sums over many tokens of one sign: in f64.
        let (mut of_log, mut of_bias) = (0.0f64, 0.0f64);
        for t in 0..rows {
            let (dg, dbeta, at) = (dg[h * rows + t], dbeta[h * rows + t], t * heads + h);
            let x = a[at] + dt_bias[h];
            of_log += (dg * keep * softplus(x)) as f64;
            a[at] = dg * keep * sigmoid(x);
            of_bias += a[at] as f64;
            let beta = sigmoid(b[at]);
            b[at] = dbeta * beta * (1.0 - beta);
        }
        d_a_log[h] += of_log as f32;
        d_dt_bias[h] += of_bias as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (t, heads) = (9, 3);
        let n = t * heads;
        let (a, b, a_log, dt_bias) = (random(n, 1), random(n, 2), random(heads, 3), random(heads, 4));
        let (up_g, up_beta) = (random(n, 5), random(n, 6));
        let loss = |a: &[f32], b: &[f32], a_log: &[f32], dt_bias: &[f32]| {
            let (mut g, mut beta) = (vec![0.0; n], vec![0.0; n]);
            forward(a, b, a_log, dt_bias, &mut g, &mut beta);
            weigh(&g, &up_g) + weigh(&beta, &up_beta)
        };
        let by_head = |x: &[f32]| -> Vec<f32> { (0..n).map(|i| x[i % t * heads + i / t]).collect() };
        let (mut da, mut db, mut d_a_log, mut d_dt) = (a.clone(), b.clone(), vec![0.0; heads], vec![0.0; heads]);
        let (dg, dbeta) = (by_head(&up_g), by_head(&up_beta));
        backward(&dg, &dbeta, &mut da, &mut db, &a_log, &dt_bias, &mut d_a_log, &mut d_dt);
        check_gradient("a", &a, &da, |a| loss(a, &b, &a_log, &dt_bias));
        check_gradient("b", &b, &db, |b| loss(&a, b, &a_log, &dt_bias));
        check_gradient("A_log", &a_log, &d_a_log, |a_log| loss(&a, &b, a_log, &dt_bias));
        check_gradient("dt_bias", &dt_bias, &d_dt, |dt| loss(&a, &b, &a_log, dt));
    }

    #[test]
    fn large_and_small_inputs_stay_finite() {
        let (mut g, mut beta) = (vec![0.0; 2], vec![0.0; 2]);
        forward(&[200.0, -200.0], &[200.0, -200.0], &[0.0], &[0.0], &mut g, &mut beta);
        assert_eq!((g, beta), (vec![-200.0, 0.0], vec![1.0, 0.0]));
    }
}
