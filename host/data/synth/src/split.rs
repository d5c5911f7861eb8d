//! Which scenes are training scenes and which are held out.
//!
//! A *kind* is a colour with a shape (144 of them). A fifth of the unordered pairs of kinds is held out: no training
//! picture shows both kinds of such a pair, and the two main objects of every held-out picture are one. Held-out
//! scenes come in families of near neighbours: a first scene and others that differ from it in one attribute.

use crate::caption::{Caption, Detail, caption};
use crate::rng::{Rng, mix};
use crate::scene::{Background, Colour, Object, Relation, Scene, Shape, Size, Texture, is_sound, place, sample};
use crate::settings::Settings;

/// One pair: what is drawn and what is said of it.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Content of the picture.
    pub scene: Scene,
    /// What is said of it.
    pub caption: Caption,
}

const TRAIN: u64 = 1;
const VAL: u64 = 2;

/// Whether the unordered pair of kinds is held out under this seed.
pub fn held_out(seed: u64, a: &Object, b: &Object) -> bool {
    let (low, high) = (a.kind().min(b.kind()) as u64, a.kind().max(b.kind()) as u64);
    mix(seed ^ 0x4e1d_0000 ^ mix(low * 1_000 + high)).is_multiple_of(5)
}

fn shows_held_out(seed: u64, scene: &Scene) -> bool {
    let objects = &scene.objects;
    (1..objects.len()).any(|i| objects[..i].iter().any(|b| held_out(seed, &objects[i], b)))
}

/// The training sample of this index; it depends on nothing else.
pub fn train_sample(seed: u64, index: usize, settings: &Settings) -> (Sample, Rng) {
    let mut rng = Rng::new(seed, TRAIN, index as u64);
    let scene = sample(&mut rng, settings, |scene| !shows_held_out(seed, scene));
    let caption = caption(&scene, Detail::training(settings), &mut rng);
    (Sample { scene, caption }, rng)
}

/// The held-out samples: every caption is true of its own picture and of no other held-out one.
pub fn val_samples(seed: u64, count: usize, settings: &Settings) -> Vec<Sample> {
    let mut rng = Rng::new(seed, VAL, 0);
    let mut samples: Vec<Sample> = Vec::with_capacity(count);
    let is_held_out = |scene: &Scene| held_out(seed, &scene.objects[0], &scene.objects[1]);
    while samples.len() < count {
        let first = sample(&mut rng, settings, is_held_out);
        let mut family = vec![first.clone()];
        for _ in 0..settings.family * 8 {
            if family.len() == settings.family {
                break;
            }
            if let Some(near) = neighbour(&first, &mut rng)
                && is_held_out(&near)
                && !family.iter().any(|other| same_attributes(other, &near))
            {
                family.push(near);
            }
        }
        if family.len() < settings.family {
            continue;
        }
        // Either the whole family is told apart by its captions, or it is dropped.
        let kept = samples.len();
        for scene in family {
            if samples.len() < count
                && let Some(sample) = tell_apart(scene, &samples, settings, &mut rng)
            {
                samples.push(sample);
            }
        }
        if samples.len() - kept < settings.family.min(count - kept) {
            samples.truncate(kept);
        }
    }
    // Neighbours must not stand side by side: their order would be a hint.
    rng.shuffle(&mut samples);
    samples
}

fn same_attributes(a: &Scene, b: &Scene) -> bool {
    let key = |o: &Object| (o.shape, o.colour, o.size, o.texture);
    a.background == b.background && a.relation == b.relation && a.objects.iter().map(key).eq(b.objects.iter().map(key))
}

/// The scene with one attribute changed, placed and drawn anew; `None` when the change is not sound.
fn neighbour(scene: &Scene, rng: &mut Rng) -> Option<Scene> {
    let mut near = scene.clone();
    let at = rng.below(near.objects.len());
    match rng.weighted(&[24, 24, 12, 12, 14, 14]) {
        0 => near.objects[at].colour = rng.pick(Colour::ALL),
        1 => near.objects[at].shape = rng.pick(Shape::ALL),
        2 => {
            // Small against large: the middle size is a matter of opinion.
            near.objects[at].size = match near.objects[at].size {
                Size::Small => Size::Large,
                Size::Large => Size::Small,
                Size::Medium => return None,
            }
        }
        3 => near.objects[at].texture = rng.pick(Texture::ALL),
        4 => near.background = rng.pick(Background::ALL),
        _ => match near.relation {
            Relation::LeftOf | Relation::Above if rng.percent(50) => near.objects.swap(0, 1),
            Relation::LeftOf => near.relation = Relation::Above,
            Relation::Above => near.relation = Relation::LeftOf,
            Relation::Between => near.objects.swap(0, 1),
            Relation::Inside => return None,
        },
    }
    (!same_attributes(scene, &near) && is_sound(&near) && place(&mut near, rng)).then_some(near)
}

/// A caption that is false of all others, while theirs are false of this scene; more is told at each attempt.
fn tell_apart(scene: Scene, others: &[Sample], settings: &Settings, rng: &mut Rng) -> Option<Sample> {
    if others.iter().any(|other| other.caption.facts.hold(&scene)) {
        return None;
    }
    for attempt in 0..24 {
        let detail = Detail {
            omit: (settings.omit * 3 / 4).saturating_sub(attempt),
            typo: settings.typo,
            thorough: attempt > 4,
        };
        let caption = caption(&scene, detail, rng);
        if others.iter().all(|other| !caption.facts.hold(&other.scene)) {
            return Some(Sample { scene, caption });
        }
    }
    None
}
