//! Windows over an image in NHWC, packed straight from it: the operands of a convolution that are never stored.

use crate::blocked::{MAX_RUNS, Panels};
use crate::conv::ConvShape;
use crate::few_channels;
use crate::microkernel::{Lines, MAX_MR, MAX_NR, MicroKernels, Source, Starts, ZEROS};

/// The taps along one axis: tap number `n` is the kernel's `first + n * step`, and reads at a pixel's position plus
/// `offset + n * distance`.
#[derive(Clone, Copy)]
pub(crate) struct Axis {
    pub count: usize,
    pub first: usize,
    pub step: usize,
    pub offset: isize,
    pub distance: isize,
}

impl Axis {
    /// All taps, for windows over the input.
    pub fn forward(kernel: usize, padding: usize, dilation: usize) -> Axis {
        Axis { count: kernel, first: 0, step: 1, offset: -(padding as isize), distance: dilation as isize }
    }

    /// The taps that meet input pixels of remainder `phase`, for windows over the output.
    pub fn phase(kernel: usize, stride: usize, padding: usize, dilation: usize, phase: usize) -> Axis {
        let meets = |tap: &usize| (phase + padding + stride * tap * dilation - tap * dilation).is_multiple_of(stride);
        let count = (0..kernel).filter(meets).count();
        let mut taps = (0..kernel).filter(meets);
        let Some(first) = taps.next() else {
            return Axis { count: 0, first: 0, step: 1, offset: 0, distance: 0 };
        };
        let step = taps.next().map_or(1, |second| second - first);
        let at = |tap: usize| (phase as isize + padding as isize - (tap * dilation) as isize) / stride as isize;
        Axis { count, first, step, offset: at(first), distance: -((step * dilation / stride) as isize) }
    }

    pub fn tap(&self, number: usize) -> usize {
        self.first + number * self.step
    }

    fn position(&self, pixel: usize, number: usize) -> isize {
        pixel as isize + self.offset + number as isize * self.distance
    }
}

/// Windows over an image in NHWC: lines are pixels of a grid, depth is (tap, channel).
#[derive(Clone, Copy)]
pub(crate) struct Patches<'a, T> {
    pub data: &'a [T],
    pub image: (usize, usize),
    /// Channels of the image.
    pub channels: usize,
    /// Channels of a group, and so of a tap.
    pub group: usize,
    pub grid: (usize, usize),
    /// Image pixels per step of the grid.
    pub step: (usize, usize),
    pub ys: Axis,
    pub xs: Axis,
    /// A row of taps is one run of memory: all windows are inside the image, and their taps are neighbours.
    pub wide: bool,
}

/// Elements along the depth that are copied together where runs are of odd length.
const COPIED: usize = 128;

/// A pixel of the grid, walked in order.
#[derive(Clone, Copy)]
struct Pixel {
    image: usize,
    y: usize,
    x: usize,
}

impl<'a, T: Source> Patches<'a, T> {
    pub fn of_input(shape: &ConvShape, input: &'a [T]) -> Patches<'a, T> {
        Patches {
            data: input,
            image: (shape.in_h, shape.in_w),
            channels: shape.in_c,
            group: shape.group_in(),
            grid: (shape.out_h, shape.out_w),
            step: shape.stride,
            ys: Axis::forward(shape.kernel.0, shape.padding.0, shape.dilation.0),
            xs: Axis::forward(shape.kernel.1, shape.padding.1, shape.dilation.1),
            wide: few_channels::applies(shape),
        }
    }

    fn pixel(&self, line: usize) -> Pixel {
        let (row, x) = (line / self.grid.1, line % self.grid.1);
        Pixel { image: row / self.grid.0, y: row % self.grid.0, x }
    }

    fn next(&self, pixel: &mut Pixel) {
        pixel.x += 1;
        if pixel.x == self.grid.1 {
            (pixel.x, pixel.y) = (0, pixel.y + 1);
            if pixel.y == self.grid.0 {
                (pixel.y, pixel.image) = (0, pixel.image + 1);
            }
        }
    }

    /// Length of the runs of a window: of a tap, or of a row of taps.
    fn run_len(&self) -> usize {
        if self.wide { self.xs.count * self.group } else { self.group }
    }

    /// Start of a tap's channels of `group`, or none outside the image.
    fn at(&self, pixel: &Pixel, tap_y: usize, tap_x: usize, group: usize) -> Option<usize> {
        let y = self.ys.position(pixel.y * self.step.0, tap_y);
        let x = self.xs.position(pixel.x * self.step.1, tap_x);
        // A negative position is far above any size once it is unsigned.
        if y as usize >= self.image.0 || x as usize >= self.image.1 {
            return None;
        }
        let row = pixel.image * self.image.0 + y as usize;
        Some((row * self.image.1 + x as usize) * self.channels + group * self.group)
    }

    /// Which of `len` pixels of a row, from `pixel` on, have all of a segment inside the image.
    fn inside(&self, pixel: &Pixel, segment: &Segment, len: usize) -> std::ops::Range<usize> {
        let (tap_y, tap_x) = (segment.run / self.xs.count, segment.run % self.xs.count);
        let y = self.ys.position(pixel.y * self.step.0, tap_y);
        if y as usize >= self.image.0 {
            return 0..0;
        }
        let is_inside = |at: usize| {
            let x = self.xs.position((pixel.x + at) * self.step.1, tap_x);
            (x as usize) < self.image.1
        };
        let low = (0..len).find(|&at| is_inside(at)).unwrap_or(len);
        let high = (low..len).rev().find(|&at| is_inside(at)).map_or(low, |at| at + 1);
        low..high
    }

    /// Whether lines are the pixels of the image, one by one.
    fn is_every_pixel(&self) -> bool {
        let one = |axis: &Axis| axis.count == 1 && axis.offset == 0;
        one(&self.ys) && one(&self.xs) && self.step == (1, 1) && self.grid == self.image
    }

    /// The first tap of a run.
    fn taps_of(&self, run: usize) -> (usize, usize) {
        if self.wide { (run, 0) } else { (run / self.xs.count, run % self.xs.count) }
    }

    /// `count` values of the run of a tap, from `from` on: in place, or zeros.
    #[inline(always)]
    fn values(
        &self,
        pixel: &Pixel,
        (tap_y, tap_x): (usize, usize),
        from: usize,
        count: usize,
        group: usize,
    ) -> *const T {
        match self.at(pixel, tap_y, tap_x, group) {
            Some(start) => self.data[start + from..start + from + count].as_ptr(),
            None => T::zeros()[..count].as_ptr(),
        }
    }

    /// Packs up to 16 lines where runs do not begin with a word: their values are copied side by side first.
    ///
    /// # Safety
    /// See [`Panels::pack`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn pack_copied(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        pixels: &[Pixel],
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let run = self.run_len();
        let mut copies = [[T::default(); COPIED]; 16];
        for start in (0..len).step_by(COPIED) {
            let part = (len - start).min(COPIED);
            let mut pointers = [T::zeros().as_ptr(); 16];
            for ((copy, pointer), pixel) in copies.iter_mut().zip(&mut pointers).zip(pixels) {
                let mut done = 0;
                while done < part {
                    let (number, from) = ((depth + start + done) / run, (depth + start + done) % run);
                    let count = (run - from).min(part - done);
                    let values = self.values(pixel, self.taps_of(number), from, count, batch);
                    // SAFETY: the pointer is to `count` elements.
                    copy[done..done + count].copy_from_slice(unsafe { std::slice::from_raw_parts(values, count) });
                    done += count;
                }
                *pointer = copy.as_ptr();
            }
            // SAFETY: each pointer is to `part` elements; the destination has room by the caller's promise.
            unsafe {
                let dst = dst.add(start / kernels.pair * width);
                (T::packers(kernels).transpose)(&pointers[..pixels.len()], part, dst, width);
            }
        }
    }
}

impl<T: Source> Panels for Patches<'_, T> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let mut pixels = [self.pixel(line); MAX_NR];
        for at in 1..lines {
            pixels[at] = pixels[at - 1];
            self.next(&mut pixels[at]);
        }
        let run = self.run_len();
        if kernels.pair > 1 && !run.is_multiple_of(kernels.pair) {
            for first in (0..lines).step_by(16) {
                let pixels = &pixels[first..lines.min(first + 16)];
                // SAFETY: the caller's promise.
                unsafe { self.pack_copied(kernels, batch, pixels, depth, len, dst.add(first), width) };
            }
            return;
        }
        let mut k = depth;
        while k < depth + len {
            let (number, from) = (k / run, k % run);
            let count = (run - from).min(depth + len - k).min(ZEROS);
            for first in (0..lines).step_by(16) {
                let mut pointers = [T::zeros().as_ptr(); 16];
                let pixels = &pixels[first..lines.min(first + 16)];
                for (pointer, pixel) in pointers.iter_mut().zip(pixels) {
                    *pointer = self.values(pixel, self.taps_of(number), from, count, batch);
                }
                // SAFETY: each pointer was taken from a slice of `count` elements; the destination has room by the
                // caller's promise.
                unsafe {
                    let dst = dst.add((k - depth) / kernels.pair * width + first);
                    (T::packers(kernels).transpose)(&pointers[..pixels.len()], count, dst, width);
                }
            }
            k += count;
        }
    }

    fn run(&self) -> Option<usize> {
        (self.ys.count * self.xs.count > 1).then(|| self.run_len())
    }

    fn in_place(
        &self,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        starts: &mut [Starts; MAX_RUNS],
    ) -> Option<Lines> {
        let run = self.run_len();
        let (first, from) = (depth / run, depth % run);
        // Whole runs, or a part of one.
        let (runs, run) = if from + len <= run { (1, len) } else { (len / run, run) };
        let whole = runs == 1 || from == 0 && len == runs * run;
        if !T::WORD || !whole || runs > MAX_RUNS || run > ZEROS {
            return None;
        }
        if self.is_every_pixel() {
            let start = line * self.channels + batch * self.group + depth;
            let values = &self.data[start..start + (lines - 1) * self.channels + len];
            for (at, first) in starts[0][..lines].iter_mut().enumerate() {
                *first = values.as_ptr().wrapping_add(at * self.channels).cast();
            }
        } else if self.wide {
            // All rows of taps of all windows are inside, a row of the image apart.
            let row = self.image.1 * self.channels * self.ys.distance.unsigned_abs();
            let mut pixel = self.pixel(line);
            let mut firsts: Starts = [std::ptr::null(); MAX_MR];
            for start in &mut firsts[..lines] {
                *start = self.values(&pixel, (first, 0), from, run, batch).cast();
                self.next(&mut pixel);
            }
            for (number, starts) in starts[..runs].iter_mut().enumerate() {
                *starts = firsts.map(|start| start.wrapping_add(number * row));
            }
        } else {
            for (number, starts) in (first..).zip(&mut starts[..runs]) {
                let (tap_y, tap_x) = self.taps_of(number);
                let mut pixel = self.pixel(line);
                for start in &mut starts[..lines] {
                    *start = self.values(&pixel, (tap_y, tap_x), from, run, batch).cast();
                    self.next(&mut pixel);
                }
            }
        }
        Some(Lines { starts: starts.as_ptr(), runs, run, step: 1 })
    }
}

/// The same windows with lines and depth exchanged: lines are (tap, channel), depth is pixels.
pub(crate) struct PatchColumns<'a, T>(pub Patches<'a, T>);

/// Neighbouring lines of one run and one panel.
#[derive(Clone, Copy, Default)]
struct Segment {
    run: usize,
    from: usize,
    count: usize,
    /// Place in the first row of the packed block.
    dst: usize,
}

/// Segments that are packed together.
const SEGMENTS: usize = 64;

impl<T: Source> PatchColumns<'_, T> {
    /// Packs segments for `len` pixels from number `depth` on, row by row of the grid.
    ///
    /// # Safety
    /// For each word of `len` rows of `width`, `dst` is writable where the segments say.
    #[allow(clippy::too_many_arguments)]
    unsafe fn pack_segments(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        segments: &[Segment],
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let (patches, pair) = (&self.0, kernels.pair);
        let mut pixel = patches.pixel(depth);
        let mut k = 0;
        while k < len {
            // Whole words of one row of the grid; a word that reaches into the next row goes alone.
            let row = (patches.grid.1 - pixel.x).min(len - k);
            let count = if row > pair { row / pair * pair } else { pair.min(len - k) };
            for segment in segments {
                // SAFETY: the caller's promise.
                unsafe {
                    let dst = dst.add(segment.dst + k / pair * width);
                    self.pack_run(kernels, batch, segment, &pixel, count, dst, width);
                }
            }
            (0..count).for_each(|_| patches.next(&mut pixel));
            k += count;
        }
    }

    /// Packs a segment for `len` pixels: of one row of the grid, or of one word.
    ///
    /// # Safety
    /// `dst` is writable for a segment in each of the rows.
    #[allow(clippy::too_many_arguments)]
    unsafe fn pack_run(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        segment: &Segment,
        pixel: &Pixel,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let (patches, pair, count) = (&self.0, kernels.pair, segment.count);
        let inside = if len > pair { patches.inside(pixel, segment, len) } else { 0..0 };
        // Whole words of pixels whose windows are inside are a regular part of memory.
        let (low, high) = (inside.start.next_multiple_of(pair), inside.end / pair * pair);
        let mut at = 0;
        let mut now = *pixel;
        while at < len {
            if at == low && low < high {
                let values = patches.values(&now, patches.taps_of(segment.run), segment.from, count, batch);
                let stride = patches.step.1 * patches.channels;
                // SAFETY: these pixels are in one row and inside, `stride` apart; the rest is the caller's promise.
                unsafe { kernels.pack_rows(values, stride, count, high - low, dst.add(at / pair * width), width) };
                now.x += high - low;
                at = high;
                continue;
            }
            let rows = pair.min(len - at);
            let mut values = [T::zeros().as_ptr(); 2];
            for value in values.iter_mut().take(rows) {
                *value = patches.values(&now, patches.taps_of(segment.run), segment.from, count, batch);
                patches.next(&mut now);
            }
            // SAFETY: both are pointers to `count` elements; the rest is the caller's promise.
            unsafe { (T::packers(kernels).rows)(values, 0, count, rows, dst.add(at / pair * width), width) };
            at += rows;
        }
    }
}

impl<T: Source> Panels for PatchColumns<'_, T> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.pack_block(kernels, batch, line, lines, depth, len, dst, width) }
    }

    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack_block(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let run = self.0.run_len();
        let mut segments = [Segment::default(); SEGMENTS];
        let (mut done, mut count) = (0, 0);
        while done < lines {
            let (number, from) = ((line + done) / run, (line + done) % run);
            let length = (run - from).min(lines - done).min(width - done % width);
            let dst_at = done / width * kernels.words(len) * width + done % width;
            segments[count] = Segment { run: number, from, count: length, dst: dst_at };
            (done, count) = (done + length, count + 1);
            if count == SEGMENTS || done == lines {
                // SAFETY: the caller promises the panels that the segments are in.
                unsafe { self.pack_segments(kernels, batch, &segments[..count], depth, len, dst, width) };
                count = 0;
            }
        }
    }
}
