//! When: the next launches of each profile, as a hazard over the coming horizon.
