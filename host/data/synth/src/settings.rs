//! What a level of difficulty means.

use serde::{Deserialize, Serialize};

/// How hard the pictures are to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difficulty {
    /// Two or three objects, little clutter, full captions.
    Easy,
    /// Two to four objects, moderate clutter, captions that leave things out.
    #[default]
    Standard,
    /// More objects, more clutter, larger jitter, more typos.
    Hard,
}

impl std::str::FromStr for Difficulty {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "easy" => Ok(Self::Easy),
            "standard" => Ok(Self::Standard),
            "hard" => Ok(Self::Hard),
            other => Err(format!("difficulty '{other}' is none of easy, standard, hard")),
        }
    }
}

/// The numbers behind a [`Difficulty`].
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Weights of 2, 3 and 4 objects.
    pub objects: [u32; 3],
    /// Largest number of faint specks strewn over the background.
    pub clutter: usize,
    /// Half width of the noise on each pixel, in grey levels.
    pub noise: f32,
    /// Half width of the colour jitter, in grey levels.
    pub jitter: f32,
    /// Largest tilt of an object, as the tangent of half the angle.
    pub tilt: f32,
    /// Percentage of attributes left out of a training caption.
    pub omit: u32,
    /// Percentage of captions with a typing error.
    pub typo: u32,
    /// Held-out scenes per family of near neighbours.
    pub family: usize,
}

impl Difficulty {
    /// The numbers of this level.
    pub fn settings(self) -> Settings {
        match self {
            Self::Easy => Settings {
                objects: [80, 20, 0],
                clutter: 2,
                noise: 1.0,
                jitter: 8.0,
                tilt: 0.05,
                omit: 8,
                typo: 1,
                family: 3,
            },
            Self::Standard => Settings {
                objects: [78, 19, 3],
                clutter: 4,
                noise: 1.0,
                jitter: 10.0,
                tilt: 0.12,
                omit: 12,
                typo: 3,
                family: 4,
            },
            Self::Hard => Settings {
                objects: [30, 40, 30],
                clutter: 14,
                noise: 5.0,
                jitter: 20.0,
                tilt: 0.16,
                omit: 30,
                typo: 6,
                family: 8,
            },
        }
    }
}
