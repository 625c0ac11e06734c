//! The S3 server that keeps a lease's record in some rounds.

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    replite_stores::s3::run()
}
