#![doc = include_str!("../../../docs/migrations.md")]
