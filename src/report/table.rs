//! The form of the table of conditions.

/// Makes the enum `Condition` of a table: a row a condition, with all that the node does with it.
///
/// A row has a doc, the condition's name and fields, its stable name, and then, each optional and
/// in this order:
///
/// - `told if <bool>;` whether the application hears of it; the problem changes in any case
/// - `lasts <Part> = <text>;` the problem that it begins, in words for operators
/// - `ends <Part>, ..;` the problems that it ends
/// - `log <level>(<what tracing takes>);` its log line
/// - `event <Event>;` its event
/// - `counts "<counter>" ["<label>" = "<value>"] += <u64> if <bool>;` what it adds to a counter;
///   label and `if` are optional, and there may be several
macro_rules! conditions {
    ($(
        $(#[doc = $doc:literal])+
        $condition:ident $({ $($field:ident: $type:ty),+ $(,)? })? $name:literal {
            $(told if $told:expr;)?
            $(lasts $part:ident = $text:expr;)?
            $(ends $($over:ident),+;)?
            $(log $level:ident($($line:tt)+);)?
            $(event $event:expr;)?
            $(counts $counter:literal $([$label:literal = $value:literal])? += $by:expr $(, if $when:expr)?;)*
        }
    )+) => {
        /// Something that happened to a node, or how it stands, that an operator may want to know.
        #[cfg_attr(not(feature = "members"), allow(dead_code, reason = "some rows are those of a feature"))]
        #[derive(Clone, Copy)]
        pub(crate) enum Condition<'a> {
            $( $(#[doc = $doc])+ $condition $({ $($field: $type),+ })?, )+
        }

        #[allow(
            unused_variables,
            unreachable_code,
            reason = "a row need not use all fields of its condition, nor have all parts"
        )]
        impl Condition<'_> {
            /// Its name, which never changes: operators search for it.
            pub(crate) fn name(self) -> &'static str {
                match self {
                    $( Condition::$condition { .. } => $name, )+
                }
            }

            /// Whether the application hears of it this time.
            pub(super) fn is_told(self) -> bool {
                match self {
                    $( Condition::$condition $({ $($field),+ })? => true $(&& $told)?, )+
                }
            }

            /// The problem that begins with it.
            pub(super) fn begins(self) -> Option<(Part, String)> {
                match self {
                    $( Condition::$condition $({ $($field),+ })? => {
                        $(return Some((Part::$part, $text.into()));)?
                        None
                    } )+
                }
            }

            /// The problems that end with it.
            pub(super) fn ends(self) -> &'static [Part] {
                match self {
                    $( Condition::$condition { .. } => &[$($(Part::$over),+)?], )+
                }
            }

            /// Writes its log line.
            pub(super) fn log(self) {
                match self {
                    $( Condition::$condition $({ $($field),+ })? => {
                        $(tracing::$level!(condition = self.name(), $($line)+);)?
                    } )+
                }
            }

            /// Its event.
            pub(super) fn event(self) -> Option<Event> {
                match self {
                    $( Condition::$condition $({ $($field),+ })? => {
                        $(return Some($event);)?
                        None
                    } )+
                }
            }

            /// Says what it adds to its counters: the counter, its labels, and how much.
            #[cfg(any(feature = "metrics", feature = "prometheus"))]
            pub(super) fn count(
                self,
                mut add: impl FnMut(&'static str, &[(&'static str, &'static str)], u64),
            ) {
                match self {
                    $( Condition::$condition $({ $($field),+ })? => {
                        $(if true $(&& $when)? {
                            let labels = [$(($label, $value))?];
                            add($counter, &labels, $by);
                        })*
                    } )+
                }
            }
        }

        /// What the table has of each condition, for tests.
        #[cfg(test)]
        pub(super) const ROWS: &[super::tests::Row] = &[$(
            super::tests::Row {
                condition: stringify!($condition),
                name: $name,
                doc: concat!($($doc),+),
                begins: &[$(Part::$part)?],
                ends: &[$($(Part::$over),+)?],
                counters: &[$($counter),*],
                does_something: !concat!(
                    $("lasts", stringify!($part),)? $("ends", $(stringify!($over),)+)?
                    $("log", stringify!($level),)? $("event", stringify!($event),)?
                ).is_empty(),
            },
        )+];
    };
}

pub(super) use conditions;
