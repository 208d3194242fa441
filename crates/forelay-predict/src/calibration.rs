//! Do the probabilities mean what they say? Reliability bins, Brier score, online recalibration.
