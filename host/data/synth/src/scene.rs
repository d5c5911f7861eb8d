//! What is in a picture: objects with attributes, where they stand, and the background.

use crate::rng::Rng;
use crate::settings::Settings;

macro_rules! attribute {
    ($(#[$doc:meta])* $name:ident { $($variant:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($variant),+ }
        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
        }
    };
}

attribute! {
    /// The outline of an object.
    Shape { Circle, Square, Triangle, Star, Heart, Ring, Cross, Diamond, Crescent, Arrow, Oval, Bar }
}
attribute! {
    /// The main colour of an object.
    Colour { Red, Orange, Yellow, Green, Blue, Purple, Pink, Brown, White, Black, Teal, Grey }
}
attribute! {
    /// The size of an object; the radii are far enough apart to be told by eye.
    Size { Small, Medium, Large }
}
attribute! {
    /// What the surface of an object looks like.
    Texture { Plain, Striped, Dotted, Outlined }
}
attribute! {
    /// What is behind the objects.
    Background { Cream, Dark, Stripes, Checker, Gradient, Meadow, Night, Bricks, Water, Sand, Wood, Grid }
}
attribute! {
    /// How the first object stands to the second (and third). The mirror images (right of, below) are a matter of
    /// wording, not of the scene.
    Relation { LeftOf, Above, Inside, Between }
}

impl Colour {
    /// The middle of the colour's range, sRGB.
    pub fn rgb(self) -> [f32; 3] {
        match self {
            Self::Red => [214.0, 32.0, 38.0],
            Self::Orange => [245.0, 134.0, 20.0],
            Self::Yellow => [248.0, 220.0, 40.0],
            Self::Green => [40.0, 156.0, 56.0],
            Self::Blue => [36.0, 78.0, 214.0],
            Self::Purple => [128.0, 44.0, 172.0],
            Self::Pink => [250.0, 130.0, 186.0],
            Self::Brown => [116.0, 66.0, 28.0],
            Self::White => [250.0, 250.0, 250.0],
            Self::Black => [18.0, 18.0, 20.0],
            Self::Teal => [20.0, 190.0, 196.0],
            Self::Grey => [136.0, 138.0, 142.0],
        }
    }
}

impl Background {
    /// Daylight backgrounds are washed out, so that saturated colours belong to objects.
    pub fn wash(self, colour: [f32; 3]) -> [f32; 3] {
        match self {
            Self::Dark | Self::Night => colour,
            _ => colour.map(|channel| channel + (232.0 - channel) * 0.4),
        }
    }

    /// The main colours, before [`Background::wash`].
    pub fn palette(self) -> [[f32; 3]; 2] {
        match self {
            Self::Cream => [[240.0, 230.0, 204.0]; 2],
            Self::Dark => [[44.0, 46.0, 58.0]; 2],
            Self::Stripes => [[206.0, 214.0, 232.0], [158.0, 172.0, 204.0]],
            Self::Checker => [[226.0, 226.0, 222.0], [176.0, 176.0, 172.0]],
            Self::Gradient => [[232.0, 214.0, 232.0], [120.0, 96.0, 136.0]],
            Self::Meadow => [[150.0, 200.0, 242.0], [118.0, 180.0, 84.0]],
            Self::Night => [[16.0, 20.0, 62.0], [30.0, 36.0, 88.0]],
            Self::Bricks => [[168.0, 92.0, 72.0], [184.0, 104.0, 80.0]],
            Self::Water => [[56.0, 128.0, 178.0], [84.0, 156.0, 200.0]],
            Self::Sand => [[224.0, 196.0, 138.0], [210.0, 180.0, 122.0]],
            Self::Wood => [[172.0, 124.0, 74.0], [150.0, 104.0, 58.0]],
            Self::Grid => [[236.0, 240.0, 244.0]; 2],
        }
    }
}

fn distance_squared(a: [f32; 3], b: [f32; 3]) -> f32 {
    (0..3).map(|c| (a[c] - b[c]) * (a[c] - b[c])).sum()
}

/// Whether the colour stands out from the background.
pub fn stands_out(colour: Colour, background: Background) -> bool {
    background.palette().iter().all(|&base| distance_squared(colour.rgb(), background.wash(base)) > 86.0 * 86.0)
}

/// One object. `x`, `y` and `radius` are in units of 1/64 of the picture's side, whatever its size in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Object {
    /// Outline.
    pub shape: Shape,
    /// Main colour.
    pub colour: Colour,
    /// Size class.
    pub size: Size,
    /// Surface.
    pub texture: Texture,
    /// Centre, from the left.
    pub x: f32,
    /// Centre, from the top.
    pub y: f32,
    /// Circumscribed radius.
    pub radius: f32,
}

impl Object {
    /// Colour and shape as one number in `0..144`: the level at which combinations are held out.
    pub fn kind(&self) -> usize {
        self.colour as usize * Shape::ALL.len() + self.shape as usize
    }
}

/// A picture's content. Objects 0, 1 (and 2 for [`Relation::Between`]) stand in `relation`; the others are extra.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// Two to four objects of different kinds.
    pub objects: Vec<Object>,
    /// How object 0 stands to object 1.
    pub relation: Relation,
    /// What is behind them.
    pub background: Background,
}

/// Part of the picture that an object stands in, when it clearly does: `x` and `y` are -1, 0 or 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corner {
    /// -1 left, 1 right.
    pub x: i8,
    /// -1 top, 1 bottom.
    pub y: i8,
}

/// The corner that the object is plainly in, if any.
pub fn corner(object: &Object, margin: f32) -> Option<Corner> {
    let side = |v: f32| -> i8 {
        if v < 32.0 - margin {
            -1
        } else if v > 32.0 + margin {
            1
        } else {
            0
        }
    };
    let (x, y) = (side(object.x), side(object.y));
    (x != 0 && y != 0).then_some(Corner { x, y })
}

/// Whether a relation holds between placed objects. `strict` is how pictures are made; the lenient reading is the one
/// against which captions are checked to be false of every other picture.
pub fn relates(relation: Relation, objects: [&Object; 3], strict: bool) -> bool {
    let [a, b, c] = objects;
    let (dx, dy) = (b.x - a.x, b.y - a.y);
    let (reach, slope) = if strict { (13.0, 0.55) } else { (5.0, 1.4) };
    match relation {
        Relation::LeftOf => dx > reach && dy.abs() < slope * dx,
        Relation::Above => dy > reach && dx.abs() < slope * dy,
        Relation::Inside => dx * dx + dy * dy < if strict { 4.0 } else { 49.0 } && a.radius < b.radius,
        Relation::Between => {
            let (mx, my) = ((b.x + c.x) * 0.5 - a.x, (b.y + c.y) * 0.5 - a.y);
            let span = (b.x - c.x) * (b.x - c.x) + (b.y - c.y) * (b.y - c.y);
            let off = mx * mx + my * my;
            if strict { off < 0.008 * span && span > 34.0 * 34.0 } else { off < 0.08 * span }
        }
    }
}

/// A radius within the range of the size class.
fn radius(size: Size, rng: &mut Rng) -> f32 {
    match size {
        Size::Small => rng.range(6.6, 7.4),
        Size::Medium => rng.range(10.0, 11.0),
        Size::Large => rng.range(14.4, 16.0),
    }
}

/// Shapes with room for a small object within.
fn can_hold(shape: Shape) -> bool {
    matches!(shape, Shape::Circle | Shape::Square | Shape::Ring | Shape::Heart | Shape::Oval | Shape::Diamond)
}

/// Whether the attributes go together: kinds differ, colours stand out, textures are large enough to be seen.
pub fn is_sound(scene: &Scene) -> bool {
    let objects = &scene.objects;
    for (i, a) in objects.iter().enumerate() {
        if !stands_out(a.colour, scene.background) {
            return false;
        }
        if a.size == Size::Small && a.texture != Texture::Plain {
            return false;
        }
        if a.shape == Shape::Ring && a.texture == Texture::Outlined {
            // Two outlines leave nothing of the ring's own colour.
            return false;
        }
        if objects[..i].iter().any(|b| a.kind() == b.kind()) {
            return false;
        }
    }
    if scene.relation == Relation::Between && objects.len() < 3 {
        return false;
    }
    if scene.relation == Relation::Inside {
        let (inner, outer) = (&objects[0], &objects[1]);
        return inner.size == Size::Small
            && outer.size == Size::Large
            && can_hold(outer.shape)
            && matches!(outer.texture, Texture::Plain | Texture::Outlined)
            && distance_squared(inner.colour.rgb(), outer.colour.rgb()) > 125.0 * 125.0;
    }
    true
}

/// Draws attributes, then positions. Calls `accept` on the attributes before the (dearer) placement.
pub fn sample(rng: &mut Rng, settings: &Settings, accept: impl Fn(&Scene) -> bool) -> Scene {
    loop {
        let count = 2 + rng.weighted(&settings.objects);
        let mut relations = [38, 38, 16, 0];
        if count >= 3 {
            relations[3] = 30;
        }
        let relation = Relation::ALL[rng.weighted(&relations)];
        let mut objects: Vec<Object> = (0..count).map(|_| sample_object(rng)).collect();
        if relation == Relation::Inside {
            objects[0].size = Size::Small;
            objects[0].texture = Texture::Plain;
            objects[1].size = Size::Large;
        }
        let mut scene = Scene { objects, relation, background: rng.pick(Background::ALL) };
        if is_sound(&scene) && accept(&scene) && place(&mut scene, rng) {
            return scene;
        }
    }
}

fn sample_object(rng: &mut Rng) -> Object {
    let size = Size::ALL[rng.weighted(&[34, 36, 30])];
    let texture = if size == Size::Small { Texture::Plain } else { Texture::ALL[rng.weighted(&[52, 18, 15, 15])] };
    Object { shape: rng.pick(Shape::ALL), colour: rng.pick(Colour::ALL), size, texture, x: 0.0, y: 0.0, radius: 0.0 }
}

/// Finds positions at which nothing overlaps and the relation holds plainly; false when there is no room.
pub fn place(scene: &mut Scene, rng: &mut Rng) -> bool {
    for object in &mut scene.objects {
        object.radius = radius(object.size, rng);
    }
    'attempt: for _ in 0..200 {
        for i in 0..scene.objects.len() {
            let (x, y) = if i == 1 && scene.relation == Relation::Inside {
                // Nested objects share a centre; the outer one is drawn first.
                let inner = scene.objects[0];
                (inner.x + rng.range(-1.0, 1.0), inner.y + rng.range(-1.0, 1.0))
            } else if i == 2 && scene.relation == Relation::Between {
                let (a, b) = (scene.objects[0], scene.objects[1]);
                (2.0 * a.x - b.x + rng.range(-2.0, 2.0), 2.0 * a.y - b.y + rng.range(-2.0, 2.0))
            } else {
                (rng.range(6.0, 58.0), rng.range(6.0, 58.0))
            };
            let margin = scene.objects[i].radius + 0.5;
            if x < margin || y < margin || x > 64.0 - margin || y > 64.0 - margin {
                continue 'attempt;
            }
            scene.objects[i].x = x;
            scene.objects[i].y = y;
            let (object, others) = (scene.objects[i], &scene.objects[..i]);
            for (j, other) in others.iter().enumerate() {
                let nested = scene.relation == Relation::Inside && i == 1 && j == 0;
                let apart = object.radius + other.radius + 0.8;
                let (dx, dy) = (object.x - other.x, object.y - other.y);
                if !nested && dx * dx + dy * dy < apart * apart {
                    continue 'attempt;
                }
            }
        }
        let third = scene.objects.get(2).unwrap_or(&scene.objects[1]);
        if relates(scene.relation, [&scene.objects[0], &scene.objects[1], third], true) {
            return true;
        }
    }
    false
}
