//! Frequencies of the rotary embedding, plain or stretched to longer contexts, as transformers' `modeling_rope_utils`
//! defines them: `rope_parameters` (version 5) or `rope_theta` with `rope_scaling` (before).

use super::{Config, Refusal};
use std::f64::consts::PI;

#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// D/2 values, fewer where a part of the head turns; the angle of feature i at position p is p times value i.
    pub inverse_frequencies: Vec<f32>,
    /// What cosines and sines are multiplied with (yarn's attention factor).
    pub factor: f32,
}

impl Rope {
    /// `partial`: which part of a head the family turns where its config does not say; `None` where it turns whole heads alone.
    pub fn from_config(
        config: &Config,
        family: &'static str,
        head_dim: usize,
        max_positions: usize,
        partial: Option<f64>,
    ) -> Result<Rope, Refusal> {
        let refuse = |what: String, supported| Refusal::Option { family, what, supported };
        let empty = || Config::parse("{}").expect("an empty object is JSON");
        let options = config.object("rope_parameters").or(config.object("rope_scaling")).unwrap_or_else(empty);
        let theta = options.number("rope_theta")?.or(config.number("rope_theta")?).unwrap_or(10_000.0);
        let part = options.number("partial_rotary_factor")?.or(config.number("partial_rotary_factor")?);
        let part = match (part, partial) {
            (Some(part), None) if part != 1.0 => {
                return Err(refuse(format!("partial_rotary_factor {part}"), "whole heads that turn do"));
            }
            (given, default) => given.or(default).unwrap_or(1.0),
        };
        let turning = (head_dim as f64 * part) as usize;
        if turning == 0 || turning > head_dim || !turning.is_multiple_of(2) {
            let why = format!("partial_rotary_factor {part} turns {turning} features of {head_dim}, not an even part");
            return Err(Refusal::Config(why));
        }
        let head_dim = turning;
        let plain: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let needed = |key: &str| {
            let missing = || Refusal::Config(format!("rope_parameters has no {key}"));
            options.number(key)?.filter(|&x| x > 0.0).ok_or_else(missing)
        };
        let original =
            || Ok::<_, Refusal>(options.number("original_max_position_embeddings")?.unwrap_or(max_positions as f64));
        let mut attention_factor = 1.0;
        let kind = options.text("rope_type").or(options.text("type")).unwrap_or("default");
        let frequencies = match kind {
            "default" => plain,
            "linear" => {
                let factor = needed("factor")?;
                plain.iter().map(|f| f / factor).collect()
            }
            "llama3" => {
                let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
                llama3(&plain, needed("factor")?, low, high, original()?)
            }
            "yarn" => {
                let original = original()?;
                let factor = match options.number("factor")? {
                    Some(factor) => factor,
                    None => max_positions as f64 / original,
                };
                attention_factor = match options.number("attention_factor")? {
                    Some(given) => given,
                    None => match (options.number("mscale")?, options.number("mscale_all_dim")?) {
                        (Some(a), Some(b)) if a != 0.0 && b != 0.0 => mscale(factor, a) / mscale(factor, b),
                        _ => mscale(factor, 1.0),
                    },
                };
                // A zero stands for the default here, as it does in transformers.
                let or = |key, default| Ok::<_, Refusal>(options.number(key)?.filter(|&x| x != 0.0).unwrap_or(default));
                let (fast, slow) = (or("beta_fast", 32.0)?, or("beta_slow", 1.0)?);
                yarn(&plain, theta, factor, original, fast, slow, options.flag("truncate", true)?)
            }
            other => {
                return Err(refuse(format!("rope_type '{other}'"), "'default', 'linear', 'llama3' and 'yarn' do"));
            }
        };
        Ok(Rope {
            inverse_frequencies: frequencies.into_iter().map(|f| f as f32).collect(),
            factor: attention_factor as f32,
        })
    }
}

/// Long waves are stretched, short ones kept, those between blended by wavelength.
fn llama3(plain: &[f64], factor: f64, low: f64, high: f64, original: f64) -> Vec<f64> {
    let stretch = |&f: &f64| {
        let wavelength = 2.0 * PI / f;
        if wavelength > original / low {
            f / factor
        } else if wavelength < original / high {
            f
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    };
    plain.iter().map(stretch).collect()
}

fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// YaRN (Peng et al., arXiv 2309.00071): the same blend, by feature index between two numbers of rotations.
fn yarn(plain: &[f64], theta: f64, factor: f64, original: f64, fast: f64, slow: f64, truncate: bool) -> Vec<f64> {
    let dim = 2.0 * plain.len() as f64;
    let index = |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (index(fast), index(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(i, &f): (usize, &f64)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        f / factor * ramp + f * (1.0 - ramp)
    };
    plain.iter().enumerate().map(blend).collect()
}
