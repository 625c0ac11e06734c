//! An S3 server for tests: see `replite_stores::s3`.

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    replite_stores::s3::run()
}
