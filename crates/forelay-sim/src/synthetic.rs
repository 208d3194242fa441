//! Seeded synthetic traces.
