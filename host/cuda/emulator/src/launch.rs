//! A launch: on copies of its arguments, in one or several orders.

use crate::{Orders, POISON, State};
use clip_host_cuda::launch::{Access, Argument, Launch};
use clip_host_cuda::machine::{Handle, MachineError, Result};

/// Bytes before and after a launch's view of memory.
const MARGIN: usize = 4096;
/// Bytes of a thread's stack, and the most threads of a block; as in `shim.hpp`.
const STACK: usize = 64 << 10;
const THREADS: usize = 1024;

pub(crate) type Entry = unsafe extern "C" fn(*mut *mut u8);
pub(crate) type End = unsafe extern "C" fn() -> *mut u8;
pub(crate) type Run = unsafe extern "C" fn(Entry, *mut *mut u8, *const Terms) -> i32;

/// As in `shim.hpp`.
#[repr(C)]
pub(crate) struct Terms {
    grid: *const u32,
    threads: u32,
    order: u32,
    stacks: *mut u8,
    shared: [usize; 2],
    poison: i32,
}

/// How a launch is run.
#[derive(Clone, Copy)]
struct Order {
    /// For people.
    name: &'static str,
    /// As in `shim.hpp`.
    number: u32,
    /// Of memory that nobody wrote: what depends on it differs.
    poison: u8,
}

/// The order whose results count.
const ASCENDING: Order = Order { name: "ascending", number: 0, poison: POISON };
const OTHERS: [Order; 2] =
    [Order { name: "descending", number: 1, poison: 0xa5 }, Order { name: "shuffled", number: 2, poison: 0x5a }];

/// Memory that some arguments of a launch share, copied for it.
struct View {
    start: u64,
    end: u64,
    copy: Vec<u64>,
}

impl View {
    fn bytes(&mut self) -> &mut [u8] {
        let len = self.copy.len() * 8;
        // SAFETY: the vector's own memory, as bytes.
        unsafe { std::slice::from_raw_parts_mut(self.copy.as_mut_ptr().cast(), len) }
    }

    /// Where an address lies in the copy: with the same alignment as in memory.
    fn at(&self, address: u64) -> usize {
        MARGIN + (self.start % 256 + address - self.start) as usize
    }
}

impl State {
    /// Runs a launch; in other orders too, on copies of their own, if it is asked for.
    pub(crate) fn launch(&mut self, function: Handle, launch: &Launch, addresses: &[u64]) -> Result<()> {
        let results = self.attempt(function, launch, addresses, ASCENDING)?;
        let reorder = match self.orders {
            Orders::Ascending => false,
            Orders::First => self.reordered.insert((function.0, launch.grid)),
            Orders::Every => true,
        };
        for order in OTHERS.iter().filter(|_| reorder) {
            let others = self.attempt(function, launch, addresses, *order)?;
            for (number, (one, other)) in results.iter().zip(&others).enumerate() {
                if let Some(byte) = one.iter().zip(other).position(|(a, b)| a != b) {
                    let why = format!(
                        "byte {byte} of result {number} is {:#04x} with threads and blocks in ascending order and {:#04x} \
                         in {} order (hint: a barrier is missing, or memory is read or left that nobody wrote)",
                        one[byte], other[byte], order.name
                    );
                    return Err(MachineError::new(format!("launching {}", self.functions[function.0].name), why));
                }
            }
        }
        let written = launch.arguments.iter().zip(addresses).filter(|(a, _)| a.access != Access::Read);
        for ((argument, &at), result) in written.zip(results) {
            self.slice(at, argument.bytes)?.copy_from_slice(&result);
        }
        Ok(())
    }

    /// What a launch leaves in the arguments that it writes, in their order. Memory stays as it is.
    fn attempt(&mut self, function: Handle, launch: &Launch, addresses: &[u64], order: Order) -> Result<Vec<Vec<u8>>> {
        let Some(compiled) = self.functions.get(function.0) else {
            return Err(MachineError::new("a launch", "the function is not loaded"));
        };
        let (name, entry, run, shared) = (compiled.name.clone(), compiled.entry, compiled.run, compiled.shared);
        let mut views: Vec<View> = Vec::new();
        let mut ranges: Vec<(u64, u64)> =
            launch.arguments.iter().zip(addresses).map(|(a, &at)| (at, at + a.bytes as u64)).collect();
        ranges.sort_unstable();
        for (start, end) in ranges {
            match views.last_mut() {
                Some(last) if start < last.end => last.end = last.end.max(end),
                _ => views.push(View { start, end, copy: vec![] }),
            }
        }
        for view in &mut views {
            let bytes = 2 * MARGIN + 256 + (view.end - view.start) as usize;
            view.copy = vec![u64::from_ne_bytes([order.poison; 8]); bytes.div_ceil(8) + 32];
        }
        let find = |views: &[View], at: u64| views.iter().position(|v| v.start <= at && at < v.end).unwrap_or(0);
        let arguments: Vec<(&Argument, u64)> = launch.arguments.iter().zip(addresses.iter().copied()).collect();
        for &(argument, at) in arguments.iter().filter(|(a, _)| a.access != Access::Write) {
            let from = self.slice(at, argument.bytes)?.to_vec();
            let number = find(&views, at);
            let view = &mut views[number];
            let start = view.at(at);
            view.bytes()[start..start + from.len()].copy_from_slice(&from);
        }
        let mut pointers: Vec<*mut u8> = Vec::new();
        for &(_, at) in &arguments {
            let number = find(&views, at);
            let view = &mut views[number];
            let start = view.at(at);
            pointers.push(view.bytes()[start..].as_mut_ptr());
        }
        let before: Vec<Vec<u64>> = views.iter().map(|v| v.copy.clone()).collect();
        if self.stacks.is_empty() {
            self.stacks = vec![0; STACK / 8 * THREADS + 8];
        }
        let room = self.stacks.as_mut_ptr() as usize;
        let stacks = self.stacks.as_mut_ptr().cast::<u8>().wrapping_add(room.next_multiple_of(64) - room);
        let grid = launch.grid.as_ptr();
        let (threads, number, poison) = (launch.block[0], order.number, i32::from(order.poison));
        let terms = Terms { grid, threads, order: number, stacks, shared, poison };
        // SAFETY: the entry takes as many pointers as the launch has arguments; a wild write is found below, if it does
        // not leave the copies altogether.
        if unsafe { run(entry, pointers.as_mut_ptr(), &terms) } != 0 {
            return Err(MachineError::new(format!("launching {name}"), "its threads wait for each other forever"));
        }
        for (view, before) in views.iter_mut().zip(before) {
            let mut allowed = vec![false; view.copy.len() * 8];
            for &(argument, at) in arguments.iter().filter(|(a, _)| a.access != Access::Read) {
                if view.start <= at && at < view.end {
                    let start = view.at(at);
                    allowed[start..start + argument.bytes].fill(true);
                }
            }
            let mut old = View { start: view.start, end: view.end, copy: before };
            let (old, new) = (old.bytes(), view.bytes());
            let wild = (0..new.len()).find(|&i| !allowed[i] && old[i] != new[i]);
            if let Some(byte) = wild {
                let why = format!("it wrote byte {byte} of a view of {} bytes, outside its arguments", new.len());
                return Err(MachineError::new(format!("launching {name}"), why));
            }
        }
        let mut results = Vec::new();
        for &(argument, at) in arguments.iter().filter(|(a, _)| a.access != Access::Read) {
            let number = find(&views, at);
            let view = &mut views[number];
            let start = view.at(at);
            let new = view.bytes()[start..start + argument.bytes].to_vec();
            let read = |other: &Argument, there: u64| {
                other.access != Access::Write && there < at + argument.bytes as u64 && at < there + other.bytes as u64
            };
            let poisoned = new.chunks_exact(4).position(|word| word == [POISON; 4]);
            if argument.access == Access::Write
                && order.poison == POISON
                && !arguments.iter().any(|&(other, there)| read(other, there))
                && let Some(word) = poisoned
            {
                return Err(MachineError::new(
                    format!("launching {name}"),
                    format!("it did not write word {word} of a result"),
                ));
            }
            results.push(new);
        }
        Ok(results)
    }
}
