use crate::harness::{ReadBack, everywhere, poisoned, random, rounded_once, upload};
use finetuned_cuda::ops::swiglu;

const SIZES: [usize; 6] = [0, 1, 7, 8, 2051, 1536 * 9];

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Among them gates whose exponential overflows, to either side.
fn gates(len: usize) -> Vec<f64> {
    let mut gates = random(len, 1);
    gates.iter_mut().step_by(5).for_each(|g| *g *= 64.0);
    gates
}

#[test]
fn forward_is_that_of_double_precision() {
    for len in SIZES {
        let (gate, up) = (gates(len), random(len, 2));
        let oracle: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| g * sigmoid(g) * u).collect();
        everywhere(
            |device| {
                let (gate, up, mut out) = (upload(device, &gate), upload(device, &up), poisoned(device, len));
                swiglu::swiglu(len, &gate, &up, &mut out)?;
                Ok(vec![("out", out.all())])
            },
            |device, outputs| {
                rounded_once(&format!("{device}: swiglu of {len}"), &outputs[0].1.f64(), &oracle)
            },
        );
    }
}

#[test]
fn backward_is_that_of_double_precision_in_place() {
    for len in SIZES {
        let (gate, up, dout) = (gates(len), random(len, 2), random(len, 3));
        let of = |f: fn(f64, f64, f64) -> f64| -> Vec<f64> {
            gate.iter().zip(&up).zip(&dout).map(|((&g, &u), &d)| f(g, u, d)).collect()
        };
        let dgate = of(|g, u, d| d * u * (sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g)))));
        let dup = of(|g, _, d| d * g * sigmoid(g));
        everywhere(
            |device| {
                let (mut gate, mut up, dout) =
                    (upload(device, &gate), upload(device, &up), upload(device, &dout));
                swiglu::swiglu_backward(len, &dout, &mut gate, &mut up)?;
                Ok(vec![("dgate", gate.all()), ("dup", up.all())])
            },
            |device, outputs| {
                rounded_once(&format!("{device}: dgate of {len}"), &outputs[0].1.f64(), &dgate);
                rounded_once(&format!("{device}: dup of {len}"), &outputs[1].1.f64(), &dup);
            },
        );
    }
}
