//! The verifier finds what is wrong with launches: each defect is planted into a schedule that is right.

use clip_host_compiler::plan::{Plan, compile};
use clip_host_cuda::Rendered;
use clip_host_cuda::launch::{Access, Argument, Block, Launch, Schedule, Work};
use clip_host_cuda::schedule::schedule;
use clip_host_cuda::verify::verify;
use clip_host_graph::program::Program;
use clip_host_plugin_api::graph::Graph;
use clip_host_plugin_api::ir::{DType, Init};
use std::collections::HashMap;

/// Products, row and column reductions, a state that is updated in place, sums with partial results.
fn program() -> (Plan, Schedule) {
    let g = Graph::new();
    let x = g.input("x", &[4096, 48], DType::F32);
    let weight = g.param("weight", &[48, 32], Init::Constant(0.0));
    let state = g.state("state", &[4096, 32], Init::Constant(0.0));
    let y = x.matmul(weight).softmax();
    g.update(state, state * 0.9 + y);
    g.output("columns", y.sum(&[0], false));
    g.output("total", (y * y).sum_all());
    g.output("turned", y.t() * 2.0);
    let fragment = g.finish().expect("the program builds");
    let mut program = Program::default();
    let spliced = program.splice(&fragment, "a test", &HashMap::new(), |_, name| name.into()).expect("it is spliced");
    let at = |id: u32| spliced.nodes[id as usize];
    program.outputs.extend(fragment.outputs.iter().map(|(name, id)| (name.clone(), at(*id))));
    let plan = compile(&mut program).expect("it compiles");
    let schedule = schedule(&plan, &Rendered).expect("it is scheduled");
    (plan, schedule)
}

/// Applies a defect to the first launch that has the place for it, and gives what the verifier says.
fn with_defect(defect: impl Fn(&mut Launch) -> bool) -> String {
    let (plan, mut schedule) = program();
    let planted = schedule.work.iter_mut().any(|(work, _)| match work {
        Work::Launch(launch) => defect(launch),
        _ => false,
    });
    assert!(planted, "no launch has a place for the defect");
    let error = verify(&plan, &schedule).expect_err("the defect is found");
    let text = error.to_string();
    assert!(text.contains("launch ") && text.contains("hint:"), "{text}");
    text
}

fn first(launch: &mut Launch, is: impl Fn(&Argument) -> bool) -> Option<&mut Argument> {
    launch.arguments.iter_mut().find(|a| is(a))
}

fn in_arena(a: &Argument) -> bool {
    a.at.block == Block::Arena
}

#[test]
fn a_right_schedule_passes() {
    let (plan, schedule) = program();
    assert_eq!(verify(&plan, &schedule), Ok(()));
    assert!(schedule.work.len() > 4, "{:?}", schedule.work);
    assert!(schedule.scratch > 0);
}

#[test]
fn ranges_beyond_a_block_are_found() {
    let text = with_defect(|launch| first(launch, in_arena).map(|a| a.bytes += 1 << 30).is_some());
    assert!(text.contains("which has"), "{text}");
}

#[test]
fn ranges_beyond_a_value_are_found() {
    // The arena has room, the value has not.
    let small = |a: &Argument| in_arena(a) && a.at.offset == 0;
    let text = with_defect(|launch| first(launch, small).map(|a| a.bytes += 64).is_some());
    assert!(text.contains("but %"), "{text}");
}

#[test]
fn wrong_alignment_is_found() {
    let wide = |a: &Argument| a.align >= 16;
    let text = with_defect(|launch| {
        first(launch, wide)
            .map(|a| {
                a.at.offset += 4;
                a.bytes -= 4;
            })
            .is_some()
    });
    assert!(text.contains("16 bytes at a time"), "{text}");
}

#[test]
fn another_values_memory_is_found() {
    let text = with_defect(|launch| match first(launch, |a| in_arena(a) && a.access == Access::Read) {
        Some(argument) => {
            argument.node = Some(0);
            true
        }
        None => false,
    });
    assert!(text.contains("%0"), "{text}");
}

#[test]
fn inputs_are_not_written() {
    let text = with_defect(|launch| {
        let reads_input = |a: &Argument| matches!(a.at.block, Block::Leaf(_)) && a.bytes == 4096 * 48 * 4;
        first(launch, reads_input).map(|a| a.access = Access::Write).is_some()
    });
    assert!(text.contains("must not be written"), "{text}");
}

#[test]
fn overlapping_results_are_found() {
    let text = with_defect(|launch| {
        let read = launch.arguments.iter().find(|a| in_arena(a) && a.access == Access::Read).copied();
        let written = launch.arguments.iter().position(|a| in_arena(a) && a.access == Access::Write);
        match (read, written) {
            (Some(read), Some(written)) => {
                launch.arguments[written] = Argument { access: Access::Write, bytes: read.bytes / 2, ..read };
                launch.in_place = false;
                true
            }
            _ => false,
        }
    });
    assert!(text.contains("written over"), "{text}");
}

#[test]
fn reads_before_writes_are_found() {
    let (plan, mut schedule) = program();
    let writer = schedule
        .work
        .iter()
        .position(|(work, _)| work.arguments().iter().any(|a| in_arena(a) && a.access == Access::Write));
    schedule.work.remove(writer.expect("somebody writes"));
    let text = verify(&plan, &schedule).expect_err("the gap is found").to_string();
    assert!(text.contains("before it is written") || text.contains("was not written"), "{text}");
}

#[test]
fn grids_that_no_gpu_takes_are_found() {
    let text = with_defect(|launch| {
        launch.block = [2048, 1, 1];
        true
    });
    assert!(text.contains("2048"), "{text}");
    let text = with_defect(|launch| {
        launch.grid[1] = 70_000;
        true
    });
    assert!(text.contains("70000"), "{text}");
}
