//! Servers that the lease's record can be kept in, as real processes.

pub mod azure;
pub mod etcd;
pub mod s3;
