//! clip-host-data-synth
