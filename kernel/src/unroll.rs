//! Loops over accumulators: an array that lives in registers must only be indexed by constants.

/// Runs `$body` for `$index` = 0, 1, .. below `$count` (at most 32), each time as a `const`.
#[macro_export]
macro_rules! unroll {
    ($index:ident < $count:expr, $body:block) => {
        $crate::unroll!(@each $index, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31)
    };
    (@each $index:ident, $count:expr, $body:block, $($value:literal)*) => {
        $({
            const $index: usize = $value;
            if $index < $count $body
        })*
    };
}
