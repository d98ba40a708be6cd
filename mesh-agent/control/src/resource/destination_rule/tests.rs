//! Tables of what users write, right and wrong.
