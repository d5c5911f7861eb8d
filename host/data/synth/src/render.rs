//! Scenes to pixels.
//!
//! Only `+ - * /`, comparisons, `floor` and `abs` on f32: IEEE 754 fixes their results to the bit, so the pixels are the
//! same on every machine. Nothing here may call `sin`, `exp` or `powf`, whose last bits depend on the platform.

use crate::rng::Rng;
use crate::scene::{Background, Colour, Object, Relation, Scene, Shape, Texture};
use crate::settings::Settings;

/// Samples per pixel and axis.
const SAMPLES: usize = 3;

type Rgb = [f32; 3];

fn lerp(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t]
}

fn fract(v: f32) -> f32 {
    v - v.floor()
}

fn luminance(c: Rgb) -> f32 {
    0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]
}

/// A regular star's ten corners, outer radius 1 (constants, so that no trigonometry is needed).
const STAR: [[f32; 2]; 10] = [
    [0.0, -1.0],
    [0.247, -0.340],
    [0.951, -0.309],
    [0.400, 0.130],
    [0.588, 0.809],
    [0.0, 0.420],
    [-0.588, 0.809],
    [-0.400, 0.130],
    [-0.951, -0.309],
    [-0.247, -0.340],
];
const TRIANGLE: [[f32; 2]; 3] = [[0.0, -0.95], [0.9, 0.72], [-0.9, 0.72]];
/// Points to the right; mirrored for half of the arrows.
const ARROW: [[f32; 2]; 7] =
    [[1.0, 0.0], [0.1, -0.78], [0.1, -0.3], [-0.95, -0.3], [-0.95, 0.3], [0.1, 0.3], [0.1, 0.78]];

/// Even-odd rule.
fn in_polygon(points: &[[f32; 2]], u: f32, v: f32) -> bool {
    let mut inside = false;
    let mut previous = points[points.len() - 1];
    for &point in points {
        if (point[1] > v) != (previous[1] > v) {
            let at = (previous[0] - point[0]) * (v - point[1]) / (previous[1] - point[1]) + point[0];
            inside ^= u < at;
        }
        previous = point;
    }
    inside
}

/// Whether the point is in the shape, whose circumscribed circle is (nearly) the unit circle; v points down.
fn covers(shape: Shape, u: f32, v: f32) -> bool {
    let square = u * u + v * v;
    match shape {
        Shape::Circle => square < 0.95 * 0.95,
        Shape::Square => u.abs() < 0.78 && v.abs() < 0.78,
        Shape::Triangle => in_polygon(&TRIANGLE, u, v),
        Shape::Star => in_polygon(&STAR, u, v),
        Shape::Heart => {
            let (x, y) = (u * 1.22, -v * 1.22 + 0.1);
            let base = x * x + y * y - 1.0;
            base * base * base - x * x * y * y * y < 0.0
        }
        Shape::Ring => square < 1.0 && square > 0.56 * 0.56,
        Shape::Cross => {
            let (a, b) = (u.abs(), v.abs());
            (a < 0.3 && b < 0.95) || (b < 0.3 && a < 0.95)
        }
        Shape::Diamond => u.abs() / 0.66 + v.abs() < 1.0,
        Shape::Crescent => {
            let (x, y) = (u - 0.45, v + 0.1);
            square < 1.0 && x * x + y * y > 0.78 * 0.78
        }
        Shape::Arrow => in_polygon(&ARROW, u, v),
        Shape::Oval => u * u + v * v / (0.6 * 0.6) < 1.0,
        Shape::Bar => u.abs() < 0.98 && v.abs() < 0.34,
    }
}

/// Eight directions, for the outline.
const AROUND: [[f32; 2]; 8] =
    [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.7, 0.7], [-0.7, 0.7], [0.7, -0.7], [-0.7, -0.7]];

/// An object ready to be drawn: colours jittered, tilt drawn.
struct Brush {
    object: Object,
    base: Rgb,
    second: Rgb,
    cos: f32,
    sin: f32,
    mirror: f32,
    phase: f32,
    diagonal: bool,
    /// Brightness change from the lit to the dark side.
    shading: f32,
}

impl Brush {
    fn new(object: Object, settings: &Settings, rng: &mut Rng) -> Self {
        let mut base = object.colour.rgb();
        let jitter = match object.colour {
            Colour::White | Colour::Black | Colour::Grey => settings.jitter * 0.4,
            _ => settings.jitter,
        };
        let shift = rng.range(-0.5, 0.5) * jitter;
        for channel in &mut base {
            *channel = (*channel + shift + rng.range(-1.0, 1.0) * jitter).clamp(0.0, 255.0);
        }
        let contrast = if luminance(base) > 110.0 { [20.0; 3] } else { [245.0; 3] };
        let second = match object.texture {
            Texture::Outlined => contrast,
            _ => lerp(base, contrast, 0.72),
        };
        // The half-angle form of a rotation is rational: no sine needed.
        let t = rng.range(-1.0, 1.0) * settings.tilt;
        Self {
            object,
            base,
            second,
            cos: (1.0 - t * t) / (1.0 + t * t),
            sin: 2.0 * t / (1.0 + t * t),
            mirror: if rng.percent(50) { 1.0 } else { -1.0 },
            phase: rng.range(0.0, 1.0),
            diagonal: rng.percent(50),
            shading: rng.range(0.0, 0.22),
        }
    }

    fn local(&self, x: f32, y: f32) -> (f32, f32) {
        let (dx, dy) = ((x - self.object.x) / self.object.radius, (y - self.object.y) / self.object.radius);
        let u = dx * self.cos + dy * self.sin;
        let v = dy * self.cos - dx * self.sin;
        (u * self.mirror, v)
    }

    fn hit(&self, x: f32, y: f32) -> Option<Rgb> {
        let (u, v) = self.local(x, y);
        if u.abs() > 1.05 || v.abs() > 1.05 || !covers(self.object.shape, u, v) {
            return None;
        }
        let radius = self.object.radius;
        let second = match self.object.texture {
            Texture::Plain => false,
            Texture::Striped => {
                let along = if self.diagonal { (u + v) * 0.707 } else { v };
                fract(along * radius / 4.4 + self.phase) < 0.44
            }
            Texture::Dotted => {
                let (a, b) = (fract(u * radius / 4.8 + self.phase) - 0.5, fract(v * radius / 4.8 + self.phase) - 0.5);
                a * a + b * b < 0.3 * 0.3
            }
            Texture::Outlined => {
                let edge = 1.6 / radius;
                AROUND.iter().any(|d| !covers(self.object.shape, u + d[0] * edge, v + d[1] * edge))
            }
        };
        let colour = if second { self.second } else { self.base };
        let light = 1.0 - self.shading * (0.5 + 0.25 * (u + v));
        Some([colour[0] * light, colour[1] * light, colour[2] * light])
    }
}

/// The background with its own random parameters.
struct Backdrop {
    kind: Background,
    colours: [Rgb; 2],
    scale: f32,
    phase: [f32; 2],
    flip: bool,
    seed: u64,
}

impl Backdrop {
    fn new(kind: Background, settings: &Settings, rng: &mut Rng) -> Self {
        let mut colours = kind.palette();
        let shift = rng.range(-1.0, 1.0) * settings.jitter;
        for colour in &mut colours {
            for channel in colour {
                *channel = (*channel + shift + rng.range(-0.5, 0.5) * settings.jitter).clamp(0.0, 255.0);
            }
        }
        Self {
            kind,
            colours,
            scale: rng.range(0.85, 1.2),
            phase: [rng.range(0.0, 1.0), rng.range(0.0, 1.0)],
            flip: rng.percent(50),
            seed: rng.next_u64(),
        }
    }

    /// A random number in `[0, 1)` for a cell of a lattice.
    fn cell(&self, x: f32, y: f32) -> f32 {
        let key = ((x as i64) << 20) ^ (y as i64);
        (crate::rng::mix(self.seed ^ key as u64) >> 40) as f32 * (1.0 / 16_777_216.0)
    }

    /// The colour at a point, before [`Background::wash`].
    fn pattern(&self, x: f32, y: f32) -> Rgb {
        let [first, second] = self.colours;
        let [px, py] = self.phase;
        let s = self.scale;
        match self.kind {
            Background::Cream | Background::Dark => first,
            Background::Stripes => {
                let along = if self.flip { x + y } else { x - y };
                if fract(along / (11.0 * s) + px) < 0.5 { first } else { second }
            }
            Background::Checker => {
                let (a, b) = ((x / (8.0 * s) + px).floor(), (y / (8.0 * s) + py).floor());
                if fract((a + b) * 0.5) < 0.25 { first } else { second }
            }
            Background::Gradient => {
                let t = if self.flip { y / 64.0 } else { x / 64.0 };
                lerp(first, second, t)
            }
            Background::Meadow => {
                let horizon = 30.0 + 8.0 * px;
                if y < horizon {
                    lerp(first, [225.0, 238.0, 250.0], 0.5 * y / horizon)
                } else {
                    let blade = self.cell((x / 2.0).floor(), (y / 4.0).floor());
                    lerp(second, [84.0, 150.0, 60.0], 0.35 * blade)
                }
            }
            Background::Night => {
                let (a, b) = ((x / 8.0).floor(), (y / 8.0).floor());
                let (cx, cy) = (8.0 * a + 1.5 + 5.0 * self.cell(a, b), 8.0 * b + 1.5 + 5.0 * self.cell(b + 91.0, a));
                let near = (x - cx) * (x - cx) + (y - cy) * (y - cy);
                let lit = self.cell(a + 37.0, b + 11.0) < 0.45;
                if lit && near < 0.5 { [236.0, 236.0, 210.0] } else { lerp(first, second, y / 64.0) }
            }
            Background::Bricks => {
                let row = (y / (7.0 * s) + py).floor();
                let column = x / (13.0 * s) + px + 0.5 * fract(row * 0.5) * 2.0;
                let (fx, fy) = (fract(column), fract(y / (7.0 * s) + py));
                if fx < 0.09 || fy < 0.16 {
                    [206.0, 196.0, 186.0]
                } else {
                    lerp(first, second, self.cell(column.floor(), row))
                }
            }
            Background::Water => {
                // A parabolic wave: smooth enough, and exact.
                let t = fract(x / (14.0 * s) + px);
                let wave = 4.0 * t * (1.0 - t);
                let height = fract((y + 2.4 * wave) / (8.0 * s) + py);
                if height < 0.3 { lerp(second, [220.0, 240.0, 250.0], 0.35) } else { lerp(first, second, height) }
            }
            Background::Sand => {
                let grain = self.cell((x / 2.0).floor(), (y / 2.0).floor());
                lerp(first, if grain < 0.12 { [150.0, 120.0, 76.0] } else { second }, 0.6 * grain.max(0.3))
            }
            Background::Wood => {
                let plank = (y / (13.0 * s) + py).floor();
                let seam = fract(y / (13.0 * s) + py) < 0.08;
                let vein = self.cell((y / 1.6).floor(), plank + (x / 24.0).floor());
                if seam { [92.0, 62.0, 34.0] } else { lerp(first, second, 0.5 * vein + 0.5 * self.cell(plank, 3.0)) }
            }
            Background::Grid => {
                let (fx, fy) = (fract(x / (8.0 * s) + px), fract(y / (8.0 * s) + py));
                if fx < 0.13 || fy < 0.13 { [150.0, 182.0, 216.0] } else { first }
            }
        }
    }
}

/// Draws the scene as `size` x `size` interleaved RGB bytes.
pub fn render(scene: &Scene, size: usize, settings: &Settings, rng: &mut Rng) -> Vec<u8> {
    let backdrop = Backdrop::new(scene.background, settings, rng);
    let mut brushes: Vec<Brush> = scene.objects.iter().map(|o| Brush::new(*o, settings, rng)).collect();
    if scene.relation == Relation::Inside {
        // Later brushes cover earlier ones: the outer object goes first.
        brushes.swap(0, 1);
    }
    let specks: Vec<[f32; 4]> = (0..rng.below(settings.clutter + 1))
        .map(|_| [rng.range(0.0, 64.0), rng.range(0.0, 64.0), rng.range(0.6, 1.3), rng.range(-40.0, 40.0)])
        .collect();
    let shadow = rng.percent(40);
    let (sx, sy) = (rng.range(0.8, 1.6), rng.range(0.8, 1.6));
    let gain = rng.range(0.86, 1.08);
    let (tilt_x, tilt_y) = (rng.range(-0.1, 0.1), rng.range(-0.1, 0.1));

    let unit = 64.0 / size as f32;
    let mut pixels = Vec::with_capacity(size * size * 3);
    for row in 0..size {
        for column in 0..size {
            let mut sum = [0.0f32; 3];
            for sub in 0..SAMPLES * SAMPLES {
                let x = (column as f32 + ((sub % SAMPLES) as f32 + 0.5) / SAMPLES as f32) * unit;
                let y = (row as f32 + ((sub / SAMPLES) as f32 + 0.5) / SAMPLES as f32) * unit;
                let mut colour = None;
                for brush in brushes.iter().rev() {
                    colour = brush.hit(x, y);
                    if colour.is_some() {
                        break;
                    }
                }
                let colour = colour.unwrap_or_else(|| {
                    let mut c = backdrop.kind.wash(backdrop.pattern(x, y));
                    for speck in &specks {
                        let (dx, dy) = (x - speck[0], y - speck[1]);
                        if dx * dx + dy * dy < speck[2] * speck[2] {
                            c = [c[0] + speck[3], c[1] + speck[3], c[2] + speck[3]];
                        }
                    }
                    if shadow && brushes.iter().any(|b| b.hit(x - sx, y - sy).is_some()) {
                        c = [c[0] * 0.72, c[1] * 0.72, c[2] * 0.72];
                    }
                    c
                });
                for channel in 0..3 {
                    sum[channel] += colour[channel];
                }
            }
            let light =
                gain * (1.0 + tilt_x * (column as f32 / size as f32 - 0.5) + tilt_y * (row as f32 / size as f32 - 0.5));
            let noise = rng.range(-settings.noise, settings.noise);
            for channel in sum {
                let value = channel / (SAMPLES * SAMPLES) as f32 * light + noise;
                pixels.push((value + 0.5).clamp(0.0, 255.0) as u8);
            }
        }
    }
    pixels
}
