//! Ranges of numbers, checked while they are read so that an error points at the number.

use serde::de::{Deserialize, Deserializer, Error};

/// A whole number of at least `MIN`.
pub(crate) fn at_least<'de, D, T, const MIN: u8>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + From<u8> + PartialOrd + std::fmt::Display,
{
    let number = T::deserialize(deserializer)?;
    if number < T::from(MIN) {
        return Err(D::Error::custom(format!("expected a whole number of at least {MIN}, got {number}")));
    }
    Ok(number)
}

/// A whole number from `MIN` to `MAX`. Beyond `MAX` there are only slips of the finger, which would end in a machine
/// without memory rather than in a message.
pub(crate) fn within<'de, D, const MIN: usize, const MAX: usize>(deserializer: D) -> Result<usize, D::Error>
where
    D: Deserializer<'de>,
{
    let number = usize::deserialize(deserializer)?;
    if number < MIN {
        return Err(D::Error::custom(format!("expected a whole number of at least {MIN}, got {number}")));
    }
    if number > MAX {
        return Err(D::Error::custom(format!("expected a whole number of at most {MAX}, got {number}")));
    }
    Ok(number)
}

/// As [`at_least`], or `None`.
pub(crate) fn optional_at_least<'de, D, T, const MIN: u8>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + From<u8> + PartialOrd + std::fmt::Display,
{
    let number = Option::<T>::deserialize(deserializer)?;
    match number {
        Some(n) if n < T::from(MIN) => {
            Err(D::Error::custom(format!("expected a whole number of at least {MIN} or `None`, got {n}")))
        }
        other => Ok(other),
    }
}

/// A finite number above 0.
pub(crate) fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let x = f64::deserialize(deserializer)?;
    if x.is_finite() && x > 0.0 {
        return Ok(x);
    }
    Err(D::Error::custom(format!("expected a finite number above 0, got {x:?}")))
}

/// A finite number above 0, or `None`.
pub(crate) fn optional_positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    match Option::<f64>::deserialize(deserializer)? {
        Some(x) if !(x.is_finite() && x > 0.0) => {
            Err(D::Error::custom(format!("expected a finite number above 0 or `None`, got {x:?}")))
        }
        other => Ok(other),
    }
}

/// A finite number of at least 0.
pub(crate) fn not_negative<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let x = f64::deserialize(deserializer)?;
    if x.is_finite() && x >= 0.0 {
        return Ok(x);
    }
    Err(D::Error::custom(format!("expected a finite number of at least 0, got {x:?}")))
}

/// A finite number of at least 0, or `None`.
pub(crate) fn optional_not_negative<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    match Option::<f64>::deserialize(deserializer)? {
        Some(x) if !(x.is_finite() && x >= 0.0) => {
            Err(D::Error::custom(format!("expected a finite number of at least 0 or `None`, got {x:?}")))
        }
        other => Ok(other),
    }
}
