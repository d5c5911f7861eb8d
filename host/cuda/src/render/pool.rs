//! Pooling over images with their channels last: a thread for each element of the result.

use super::own::{Source, THREADS, Target, each};
use super::text::{Draft, Parameters};
use crate::launch::{Access, Address, Block};
use clip_host_plugin_api::ir::Pool;

/// Sizes of a pooling: `[batch, height, width, channels]` before and after.
pub struct Pooling<'a> {
    pub pool: &'a Pool,
    pub input: &'a [usize],
    pub output: &'a [usize],
}

impl Pooling<'_> {
    /// Statements that name the coordinates of element `i` of a tensor of this shape.
    fn coordinates(shape: &[usize]) -> String {
        let [_, h, w, c] = [shape[0], shape[1], shape[2], shape[3]];
        format!(
            "        const int c = i % {c}, x = i / {c} % {w}, y = i / {} % {h};\n        const u64 n = i / {};\n",
            c * w,
            c * w * h
        )
    }

    fn constants(&self) -> String {
        let p = self.pool;
        format!(
            "    const int H = {}, W = {}, C = {}, OH = {}, OW = {}, KH = {}, KW = {}, SH = {}, SW = {}, PH = {}, PW = {};\n",
            self.input[1],
            self.input[2],
            self.input[3],
            self.output[1],
            self.output[2],
            p.kernel[0],
            p.kernel[1],
            p.stride[0],
            p.stride[1],
            p.padding[0],
            p.padding[1]
        )
    }

    pub fn max(&self, x: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float best = Max::zero();
        for (int dy = 0; dy < KH; dy++)
            for (int dx = 0; dx < KW; dx++) {{
                const int iy = y * SH - PH + dy, ix = x * SW - PW + dx;
                if (iy >= 0 && iy < H && ix >= 0 && ix < W) best = larger(best, widen(p[((n * H + iy) * W + ix) * C + c]));
            }}
        narrow(best, q[i]);
",
            Self::coordinates(self.output)
        );
        self.draft(&[(x, "p")], to, self.output, &body)
    }

    /// Two launches: each window notes its first maximum, then each input asks the windows that it lies in.
    pub fn max_grad(&self, x: &Source, grad: &Source, to: Target) -> Vec<Draft> {
        let windows: usize = self.output.iter().product();
        let taps = self.pool.kernel[0] * self.pool.kernel[1];
        let note = if taps <= 256 { ("u8", 1) } else { ("u32", 4) };
        let notes = Address { block: Block::Scratch, offset: 0 };
        let body = format!(
            "{}        float best = Max::zero();
        u32 tap = 0;
        bool any = false;
        for (int dy = 0; dy < KH; dy++)
            for (int dx = 0; dx < KW; dx++) {{
                const int iy = y * SH - PH + dy, ix = x * SW - PW + dx;
                if (iy < 0 || iy >= H || ix < 0 || ix >= W) continue;
                const float v = widen(p[((n * H + iy) * W + ix) * C + c]);
                if (!any || v > best || (v != v && best == best)) {{
                    any = true;
                    best = v;
                    tap = dy * KW + dx;
                }}
            }}
        w[i] = tap;
",
            Self::coordinates(self.output)
        );
        let mut parameters = Parameters::default();
        x.parameter(&mut parameters, "p");
        parameters.raw(&format!("{} *w", note.0), notes, windows * note.1, Access::Write, note.1);
        let (text, grid) = each(windows, &body);
        let first = parameters.draft(THREADS as u32, grid, &(self.constants() + &text));

        let count: usize = self.input.iter().product();
        let body = format!(
            "{}        float sum = 0.0f;
        const int y0 = y + PH < KH ? 0 : (y + PH - KH) / SH + 1, y1 = (y + PH) / SH < OH - 1 ? (y + PH) / SH : OH - 1;
        const int x0 = x + PW < KW ? 0 : (x + PW - KW) / SW + 1, x1 = (x + PW) / SW < OW - 1 ? (x + PW) / SW : OW - 1;
        for (int oy = y0; oy <= y1; oy++)
            for (int ox = x0; ox <= x1; ox++) {{
                const u64 at = ((n * OH + oy) * OW + ox) * C + c;
                if (w[at] == (y + PH - oy * SH) * KW + x + PW - ox * SW) sum += widen(g[at]);
            }}
        narrow(sum, q[i]);
",
            Self::coordinates(self.input)
        );
        let mut parameters = Parameters::default();
        parameters.raw(&format!("const {} *w", note.0), notes, windows * note.1, Access::Read, note.1);
        grad.parameter(&mut parameters, "g");
        parameters.write("q", to.element, to.at, count, to.node, Access::Write);
        let (text, grid) = each(count, &body);
        vec![first, parameters.draft(THREADS as u32, grid, &(self.constants() + &text))]
    }

    /// What an average at (oy, ox) divides by.
    fn divisor(&self) -> &'static str {
        match self.pool.count_include_pad {
            true => {
                "((oy * SH + KH < H + 2 * PH ? KH : H + 2 * PH - oy * SH) * (ox * SW + KW < W + 2 * PW ? KW : W + 2 * PW - ox * SW))"
            }
            false => {
                "(((oy * SH - PH + KH < H ? oy * SH - PH + KH : H) - (oy * SH > PH ? oy * SH - PH : 0)) * ((ox * SW - PW + KW < W ? ox * SW - PW + KW : W) - (ox * SW > PW ? ox * SW - PW : 0)))"
            }
        }
    }

    pub fn average(&self, x: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float sum = 0.0f;
        const int oy = y, ox = x;
        for (int dy = 0; dy < KH; dy++)
            for (int dx = 0; dx < KW; dx++) {{
                const int iy = y * SH - PH + dy, ix = x * SW - PW + dx;
                if (iy >= 0 && iy < H && ix >= 0 && ix < W) sum += widen(p[((n * H + iy) * W + ix) * C + c]);
            }}
        narrow(sum / (float){}, q[i]);
",
            Self::coordinates(self.output),
            self.divisor()
        );
        self.draft(&[(x, "p")], to, self.output, &body)
    }

    pub fn average_grad(&self, grad: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float sum = 0.0f;
        const int y0 = y + PH < KH ? 0 : (y + PH - KH) / SH + 1, y1 = (y + PH) / SH < OH - 1 ? (y + PH) / SH : OH - 1;
        const int x0 = x + PW < KW ? 0 : (x + PW - KW) / SW + 1, x1 = (x + PW) / SW < OW - 1 ? (x + PW) / SW : OW - 1;
        for (int oy = y0; oy <= y1; oy++)
            for (int ox = x0; ox <= x1; ox++)
                sum += widen(g[((n * OH + oy) * OW + ox) * C + c]) / (float){};
        narrow(sum, q[i]);
",
            Self::coordinates(self.input),
            self.divisor()
        );
        self.draft(&[(grad, "g")], to, self.input, &body)
    }

    fn draft(&self, sources: &[(&Source, &str)], to: Target, shape: &[usize], body: &str) -> Draft {
        let count: usize = shape.iter().product();
        let mut parameters = Parameters::default();
        sources.iter().for_each(|(source, name)| source.parameter(&mut parameters, name));
        parameters.write("q", to.element, to.at, count, to.node, Access::Write);
        let (text, grid) = each(count, body);
        parameters.draft(THREADS as u32, grid, &(self.constants() + &text))
    }
}
