//! Certificates for members and clients.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

/// Files in PEM.
#[derive(Clone, Debug)]
pub struct Certificates {
    /// What vouches for both.
    pub roots: PathBuf,
    /// Chain and key of the members.
    pub server: [PathBuf; 2],
    /// Chain and key of the clients.
    pub client: [PathBuf; 2],
}

impl Certificates {
    /// Makes them in this directory.
    ///
    /// # Errors
    /// The system's.
    pub fn make(directory: &Path) -> io::Result<Certificates> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let authority = CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?;
        let issue = |name: &str| {
            let mut params =
                CertificateParams::new(vec!["127.0.0.1".to_owned()]).map_err(io::Error::other)?;
            // etcd refuses clients whose certificate has a common name, where there are users.
            params.distinguished_name = DistinguishedName::new();
            // etcd's gateway is a client of its own member, with that one's certificate.
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let key = KeyPair::generate().map_err(io::Error::other)?;
            let certificate = params.signed_by(&key, &authority).map_err(io::Error::other)?;
            let files = ["pem", "key"].map(|kind| directory.join(format!("{name}.{kind}")));
            fs::write(&files[0], certificate.pem())?;
            fs::write(&files[1], key.serialize_pem())?;
            Ok::<_, io::Error>(files)
        };
        let roots = directory.join("roots.pem");
        fs::write(&roots, authority.pem())?;
        Ok(Certificates { roots, server: issue("server")?, client: issue("client")? })
    }
}
