//! Scenes to English.
//!
//! A caption is drawn together with its [`Facts`]: what it says. The facts decide whether it is true of another scene,
//! which is how held-out captions are kept true of one picture only.

use crate::rng::Rng;
use crate::scene::{Background, Colour, Corner, Object, Relation, Scene, Shape, Size, Texture, corner, relates};
use crate::settings::Settings;
use crate::vocab;

/// What a caption says of one object; `None` where it is silent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mention {
    /// Colour, if told.
    pub colour: Option<Colour>,
    /// Shape, if told ("thing" leaves it out).
    pub shape: Option<Shape>,
    /// Size, if told.
    pub size: Option<Size>,
    /// Texture, if told.
    pub texture: Option<Texture>,
    /// Corner of the picture, if told.
    pub corner: Option<Corner>,
}

/// What a caption says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// One mention per object named, in the scene's order.
    pub mentions: Vec<Mention>,
    /// How the first mention stands to the second (and third).
    pub relation: Option<Relation>,
    /// The background, if told.
    pub background: Option<Background>,
}

impl Mention {
    fn holds(&self, object: &Object) -> bool {
        self.colour.is_none_or(|v| v == object.colour)
            && self.shape.is_none_or(|v| v == object.shape)
            && self.size.is_none_or(|v| v == object.size)
            && self.texture.is_none_or(|v| v == object.texture)
            && self.corner.is_none_or(|v| corner(object, 3.0) == Some(v))
    }
}

impl Facts {
    /// Whether everything said is true of the scene under some assignment of mentions to its objects. Lenient about
    /// positions: a caption that could be argued to fit counts as fitting.
    pub fn hold(&self, scene: &Scene) -> bool {
        self.background.is_none_or(|b| b == scene.background) && self.assign(scene, &mut Vec::new())
    }

    fn assign(&self, scene: &Scene, chosen: &mut Vec<usize>) -> bool {
        let next = chosen.len();
        if next == self.mentions.len() {
            return self.relation.is_none_or(|relation| {
                let at = |i: usize| chosen.get(i).map_or(&scene.objects[chosen[0]], |&o| &scene.objects[o]);
                relates(relation, [at(0), at(1), at(2)], false)
            });
        }
        for (index, object) in scene.objects.iter().enumerate() {
            if !chosen.contains(&index) && self.mentions[next].holds(object) {
                chosen.push(index);
                if self.assign(scene, chosen) {
                    return true;
                }
                chosen.pop();
            }
        }
        false
    }

    /// Every way of forgetting one thing that was said: used to measure that all of a caption has to be read.
    pub fn weakenings(&self) -> Vec<Facts> {
        let mut all = Vec::new();
        let mut push = |change: &dyn Fn(&mut Facts)| {
            let mut weaker = self.clone();
            change(&mut weaker);
            if weaker != *self {
                all.push(weaker);
            }
        };
        push(&|f| f.relation = None);
        push(&|f| f.background = None);
        for i in 0..self.mentions.len() {
            push(&|f| f.mentions[i].colour = None);
            push(&|f| f.mentions[i].shape = None);
            push(&|f| f.mentions[i].size = None);
            push(&|f| f.mentions[i].texture = None);
            push(&|f| f.mentions[i].corner = None);
        }
        all
    }
}

// A word listed twice is twice as likely.

fn shape_words(shape: Shape) -> &'static [&'static str] {
    match shape {
        Shape::Circle => &["circle", "circle", "circle", "disc", "ball", "dot"],
        Shape::Square => &["square", "square", "square", "box", "block"],
        Shape::Triangle => &["triangle", "triangle", "triangle", "pyramid"],
        Shape::Star => &["star", "star", "star", "five pointed star"],
        Shape::Heart => &["heart", "heart", "heart shape"],
        Shape::Ring => &["ring", "ring", "ring", "hoop", "donut"],
        Shape::Cross => &["cross", "cross", "plus sign", "plus"],
        Shape::Diamond => &["diamond", "diamond", "diamond", "rhombus", "lozenge"],
        Shape::Crescent => &["crescent", "crescent", "moon", "crescent moon"],
        Shape::Arrow => &["arrow", "arrow", "arrow", "pointer"],
        Shape::Oval => &["oval", "oval", "ellipse", "egg"],
        Shape::Bar => &["bar", "bar", "rectangle", "rectangle", "strip"],
    }
}

fn colour_words(colour: Colour) -> &'static [&'static str] {
    match colour {
        Colour::Red => &["red", "red", "red", "red", "crimson", "scarlet"],
        Colour::Orange => &["orange", "orange", "orange", "orange", "tangerine"],
        Colour::Yellow => &["yellow", "yellow", "yellow", "yellow", "golden", "lemon"],
        Colour::Green => &["green", "green", "green", "green", "emerald"],
        Colour::Blue => &["blue", "blue", "blue", "blue", "cobalt"],
        Colour::Purple => &["purple", "purple", "purple", "violet"],
        Colour::Pink => &["pink", "pink", "pink", "rose"],
        Colour::Brown => &["brown", "brown", "brown", "chocolate"],
        Colour::White => &["white", "white", "white", "ivory"],
        Colour::Black => &["black", "black", "black", "ebony"],
        Colour::Teal => &["teal", "teal", "turquoise", "cyan"],
        Colour::Grey => &["grey", "gray", "grey", "silver"],
    }
}

fn size_words(size: Size) -> &'static [&'static str] {
    match size {
        Size::Small => &["small", "small", "small", "tiny", "little"],
        Size::Medium => &["medium", "medium sized", "mid-sized"],
        Size::Large => &["big", "big", "large", "large", "huge"],
    }
}

/// Words before and after the noun.
fn texture_words(texture: Texture, rng: &mut Rng) -> (&'static str, &'static str) {
    let (before, after): (&[&str], &[&str]) = match texture {
        Texture::Plain => (&["solid", "plain"], &[""]),
        Texture::Striped => (&["striped", "striped", "stripy"], &["with stripes"]),
        Texture::Dotted => (&["dotted", "spotted", "polka dot"], &["with dots", "with spots"]),
        Texture::Outlined => (&["outlined", "bordered"], &["with an outline", "with a border"]),
    };
    if texture == Texture::Plain || rng.percent(70) { (rng.pick(before), "") } else { ("", rng.pick(after)) }
}

fn background_words(background: Background) -> &'static [&'static str] {
    match background {
        Background::Cream => {
            &["on a cream background", "on a plain pale background", "on cream paper", "against a beige backdrop"]
        }
        Background::Dark => {
            &["on a dark background", "against a dark backdrop", "on a plain dark background", "in the dark"]
        }
        Background::Stripes => {
            &["on a striped background", "against pale blue stripes", "on diagonal stripes", "on striped wallpaper"]
        }
        Background::Checker => {
            &["on a checkered background", "on a checkerboard", "on a chess board", "on checkered tiles"]
        }
        Background::Gradient => {
            &["on a gradient", "on a fading background", "on a lilac gradient", "against a fading lilac backdrop"]
        }
        Background::Meadow => {
            &["on a meadow", "over grass and sky", "in a green field", "on the grass under a blue sky"]
        }
        Background::Night => &["at night", "in the night sky", "against a starry sky", "on a starry night"],
        Background::Bricks => &["on a brick wall", "against bricks", "in front of a brick wall", "on bricks"],
        Background::Water => &["on the water", "in the sea", "on waves", "over rippling water"],
        Background::Sand => &["on sand", "on a sandy beach", "on the beach", "in the desert sand"],
        Background::Wood => &["on a wooden table", "on wood", "on wooden planks", "on brown planks"],
        Background::Grid => &["on graph paper", "on a grid", "on squared paper", "on a blue grid"],
    }
}

fn corner_words(at: Corner, rng: &mut Rng) -> String {
    let vertical = if at.y < 0 { rng.pick(&["top", "top", "upper"]) } else { rng.pick(&["bottom", "bottom", "lower"]) };
    let horizontal = if at.x < 0 { "left" } else { "right" };
    rng.pick(&["in the {} corner", "at the {}", "in the {}"]).replace("{}", &format!("{vertical} {horizontal}"))
}

/// How much a caption leaves out.
#[derive(Debug, Clone, Copy)]
pub struct Detail {
    /// Percentage of attributes left out.
    pub omit: u32,
    /// Percentage of captions with a typing error.
    pub typo: u32,
    /// Whether what goes without saying (medium size, plain surface) is often said.
    pub thorough: bool,
}

impl Detail {
    /// The detail of training captions.
    pub fn training(settings: &Settings) -> Self {
        Self { omit: settings.omit, typo: settings.typo, thorough: false }
    }
}

/// Longest caption in WordPiece tokens, [CLS] and [SEP] included.
pub const MAX_TOKENS: usize = 28;

/// A caption and what is known of it.
#[derive(Debug, Clone)]
pub struct Caption {
    /// As written.
    pub text: String,
    /// As meant: without typing errors. The vocabulary is made of these words.
    pub spelled: String,
    /// What it claims.
    pub facts: Facts,
}

/// Writes a caption of at most [`MAX_TOKENS`] tokens.
pub fn caption(scene: &Scene, detail: Detail, rng: &mut Rng) -> Caption {
    let mut detail = detail;
    loop {
        let (spelled, facts) = compose(scene, detail, rng);
        let (text, extra) = finish(spelled.clone(), detail, rng);
        // Each word is one token, save a mistyped one, which may fall to its letters.
        if vocab::words(&text).len() + extra + 2 <= MAX_TOKENS {
            return Caption { text, spelled, facts };
        }
        // A long scene: leave out a little more each time, so that this ends.
        detail.omit = (detail.omit + 4).min(60);
        detail.thorough = false;
    }
}

/// A noun phrase such as "a tiny crimson star with stripes".
fn phrase(object: &Object, detail: Detail, rng: &mut Rng) -> (String, Mention) {
    let mut mention = Mention::default();
    let mut words: Vec<&str> = Vec::new();
    let told = |rng: &mut Rng, weight: u32| !rng.percent((detail.omit * weight / 10).min(95));

    let size = match object.size {
        Size::Medium => rng.percent(if detail.thorough { 50 } else { 6 }),
        _ => told(rng, 14),
    };
    if size {
        mention.size = Some(object.size);
        words.push(rng.pick(size_words(object.size)));
    }
    let mut after = "";
    let texture = match object.texture {
        Texture::Plain => rng.percent(if detail.thorough { 12 } else { 3 }),
        _ => told(rng, 8),
    };
    let mut surface = "";
    if texture {
        mention.texture = Some(object.texture);
        (surface, after) = texture_words(object.texture, rng);
    }
    let colour = if told(rng, 3) {
        mention.colour = Some(object.colour);
        rng.pick(colour_words(object.colour))
    } else {
        ""
    };
    // "red striped" and "striped red" are both said.
    let (one, two) = if rng.percent(35) { (colour, surface) } else { (surface, colour) };
    words.extend([one, two]);
    if colour.is_empty() || told(rng, 2) {
        mention.shape = Some(object.shape);
        words.push(rng.pick(shape_words(object.shape)));
    } else {
        words.push(rng.pick(&["shape", "thing", "object"]));
    }
    words.push(after);
    words.retain(|w| !w.is_empty());
    let vowel = words[0].starts_with(['a', 'e', 'i', 'o', 'u']);
    let article = if vowel { "an" } else { "a" };
    words.insert(0, rng.pick(&[article, article, article, article, article, "one", ""]));
    words.retain(|w| !w.is_empty());
    (words.join(" "), mention)
}

/// The sentence and its facts, before punctuation and typing errors.
fn compose(scene: &Scene, detail: Detail, rng: &mut Rng) -> (String, Facts) {
    let mut facts = Facts::default();
    let related = if scene.relation == Relation::Between { 3 } else { 2 };
    let mut phrases = Vec::new();
    for object in &scene.objects[..related] {
        let (text, mention) = phrase(object, detail, rng);
        phrases.push(text);
        facts.mentions.push(mention);
    }
    let (a, b) = (phrases[0].clone(), phrases[1].clone());
    let template = if rng.percent(detail.omit * 6 / 10) {
        if related == 3 {
            rng.pick(&["{a}, {b} and {c}", "{b}, {c} and {a}"])
        } else {
            rng.pick(&[
                "{a} and {b}",
                "{b} and {a}",
                "{a} next to {b}",
                "{b} beside {a}",
                "{a} near {b}",
                "{a} with {b}",
            ])
        }
    } else {
        facts.relation = Some(scene.relation);
        rng.pick(match scene.relation {
            Relation::LeftOf => &[
                "{a} to the left of {b}",
                "{a} left of {b}",
                "{b} to the right of {a}",
                "{b} right of {a}",
                "{a} on the left and {b} on the right",
                "{b} with {a} on its left",
                "{a} with {b} to its right",
                "on the left {a}, on the right {b}",
            ],
            Relation::Above => &[
                "{a} above {b}",
                "{a} above {b}",
                "{a} over {b}",
                "{b} below {a}",
                "{b} under {a}",
                "{b} underneath {a}",
                "{a} on top and {b} at the bottom",
                "{b} with {a} above it",
            ],
            Relation::Inside => &[
                "{a} inside {b}",
                "{a} inside {b}",
                "{a} within {b}",
                "{b} with {a} inside",
                "{b} containing {a}",
                "{b} around {a}",
                "{a} in the middle of {b}",
                "{a} surrounded by {b}",
            ],
            Relation::Between => &[
                "{a} between {b} and {c}",
                "{a} between {b} and {c}",
                "{b} and {c} with {a} in between",
                "{b} and {c} on either side of {a}",
            ],
        })
    };
    let mut text = template.replace("{a}", &a).replace("{b}", &b);
    if let Some(c) = phrases.get(2) {
        text = text.replace("{c}", c);
    }

    for object in &scene.objects[related..] {
        if rng.percent(detail.omit * 9 / 10) {
            continue;
        }
        let (extra, mut mention) = phrase(object, detail, rng);
        let place = corner(object, 7.0).filter(|_| rng.percent(60));
        let with_place = match place {
            Some(at) => {
                mention.corner = Some(at);
                format!("{extra} {}", corner_words(at, rng))
            }
            None => extra,
        };
        facts.mentions.push(mention);
        let joint = rng.pick(&[", and ", ", ", " plus ", ", also ", ", with ", " and "]);
        text = format!("{text}{joint}{with_place}");
    }

    if !rng.percent(detail.omit * 14 / 10) {
        facts.background = Some(scene.background);
        let behind = rng.pick(background_words(scene.background));
        text = if rng.percent(22) {
            format!("{behind}, {text}")
        } else {
            let comma = if rng.percent(25) { "," } else { "" };
            format!("{text}{comma} {behind}")
        };
    }
    let opening = if rng.percent(24) {
        rng.pick(&[
            "a picture of ",
            "a drawing of ",
            "there is ",
            "an image with ",
            "this shows ",
            "i see ",
            "you can see ",
            "it is ",
            "just ",
            "here we have ",
        ])
    } else {
        ""
    };
    (format!("{opening}{text}"), facts)
}

/// Capital, full stop and perhaps a typing error; also how many tokens the error may add.
fn finish(text: String, detail: Detail, rng: &mut Rng) -> (String, usize) {
    let mut text = text;
    let mut extra = 0;
    if rng.percent(detail.typo) {
        let mut words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        let long: Vec<usize> = (0..words.len())
            .filter(|&i| words[i].len() >= 5 && words[i].bytes().all(|c| c.is_ascii_lowercase()))
            .collect();
        if !long.is_empty() {
            let at = rng.pick(&long);
            let mut letters: Vec<char> = words[at].chars().collect();
            // The first letter stays: people rarely mistype it, and the word stays recognisable.
            let spot = 1 + rng.below(letters.len() - 2);
            match rng.below(3) {
                0 => letters.swap(spot, spot + 1),
                1 => {
                    letters.remove(spot);
                }
                _ => letters.insert(spot, letters[spot]),
            }
            extra = letters.len();
            words[at] = letters.into_iter().collect();
        }
        text = words.join(" ");
    }
    if rng.percent(45) {
        let mut letters = text.chars();
        if let Some(first) = letters.next() {
            text = first.to_uppercase().chain(letters).collect();
        }
    }
    if rng.percent(40) {
        text.push('.');
    }
    (text, extra)
}
