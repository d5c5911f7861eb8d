//! Defects that only show when threads and blocks run in another order, each planted into a kernel that is right.

use clip_host_cuda::Machine;
use clip_host_cuda::launch::{Access, Address, Argument, Block, Function, Launch};
use clip_host_cuda::machine::Result;
use clip_host_cuda_emulator::Emulator;

const THREADS: u32 = 256;
const BLOCKS: u32 = 8;
const COUNT: usize = (THREADS * BLOCKS) as usize;

/// Each block turns its part of the input round, twice, through the same shared memory.
const RIGHT: &str = "(const float *__restrict__ p, float *__restrict__ q)
{
    __shared__ float room[256];
    const u32 t = threadIdx.x, i = blockIdx.x * 256 + t;
    room[t] = p[i];
    __syncthreads();
    const float first = room[255 - t];
    __syncthreads();
    room[t] = first;
    __syncthreads();
    q[i] = first + 2.0f * room[255 - t];
}
";

/// Runs a kernel's text over 2,048 floats; `None` where there is no emulator.
fn launch(name: &str, text: &str, orders: bool) -> Option<Result<Vec<u8>>> {
    let emulator = match Emulator::new() {
        Ok(emulator) if orders => emulator.in_other_orders(),
        Ok(emulator) => emulator,
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    Some(run(&emulator, name, text))
}

fn run(emulator: &Emulator, name: &str, text: &str) -> Result<Vec<u8>> {
    let function = Function { name: name.into(), text: text.into(), threads: THREADS };
    let handle = emulator.load(&[function])?[0];
    let addresses = [emulator.alloc(COUNT * 4)?, emulator.alloc(COUNT * 4)?];
    let values: Vec<u8> = (0..COUNT).flat_map(|i| (i as f32).to_le_bytes()).collect();
    emulator.upload(addresses[0], &values)?;
    let at = Address { block: Block::Arena, offset: 0 };
    let argument = |access| Argument { at, bytes: COUNT * 4, access, align: 4, node: None };
    let arguments = vec![argument(Access::Read), argument(Access::Write)];
    let launch = Launch { function: 0, grid: [BLOCKS, 1, 1], block: [THREADS, 1, 1], arguments, in_place: false };
    emulator.launch(handle, &launch, &addresses)?;
    let mut bytes = vec![0; COUNT * 4];
    emulator.download(addresses[1], &mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_right_kernel_gives_the_same_in_all_orders() {
    let (Some(one), Some(other)) = (launch("right", RIGHT, false), launch("right", RIGHT, true)) else { return };
    let one = one.expect("it runs");
    assert_eq!(one, other.expect("it runs in all orders"));
    let values: Vec<f32> = one.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert_eq!((values[0], values[300]), (255.0, 256.0 + 211.0 + 2.0 * 300.0));
}

/// The planted defect is found, and its function named.
fn is_found(name: &str, text: &str) {
    let Some(result) = launch(name, text, true) else { return };
    let error = result.map(|_| ()).expect_err("the defect is found").to_string();
    assert!(error.contains(name) && (error.contains("order") || error.contains("did not write")), "{error}");
}

#[test]
fn missing_barriers_are_found() {
    let barrier = "    __syncthreads();\n";
    let starts: Vec<usize> = RIGHT.match_indices(barrier).map(|(at, _)| at).collect();
    assert_eq!(starts.len(), 3);
    for (number, &start) in starts.iter().enumerate() {
        let text = format!("{}{}", &RIGHT[..start], &RIGHT[start + barrier.len()..]);
        is_found(&format!("without_barrier_{number}"), &text);
    }
}

#[test]
fn blocks_that_write_the_same_place_are_found() {
    let text =
        "(const float *p, float *q)\n{\n    for (u32 i = threadIdx.x; i < 2048; i += 256) q[i] = p[blockIdx.x];\n}\n";
    is_found("all_write_all", text);
    // In ascending order the last block's values stay: nothing is seen.
    assert!(launch("all_write_all", text, false).is_none_or(|result| result.is_ok()));
}

#[test]
fn shared_memory_that_nobody_wrote_is_found() {
    // Thread 0 leaves its place to the block before, from which a static variable would keep it.
    is_found("unwritten_shared", &RIGHT.replace("    room[t] = p[i];", "    if (t != 0 || i == 0) room[t] = p[i];"));
}

#[test]
fn results_that_are_left_in_part_are_found() {
    // Half a word: too little for the words of poison that the launch in ascending order is searched for.
    let store = "    ((u16 *)q)[2 * i] = 1;\n    if (i != 77) ((u16 *)q)[2 * i + 1] = 2;\n";
    is_found(
        "half_a_word",
        &format!("(const float *p, float *q)\n{{\n    const u32 i = blockIdx.x * 256 + threadIdx.x;\n{store}}}\n"),
    );
}
