//! clip-host-recipe
