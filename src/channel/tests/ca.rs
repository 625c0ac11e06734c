//! A certificate authority of the tests' own.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};

pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub(crate) pem: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Ca {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Ca { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for a name.
    pub(crate) fn leaf(&self, name: &str) -> Leaf {
        self.signed(name, &KeyPair::generate().unwrap(), |_| {})
    }

    /// Another one for the key of that.
    pub(crate) fn renewed(&self, name: &str, leaf: &Leaf) -> Leaf {
        self.signed(name, &KeyPair::from_pem(&leaf.key).unwrap(), |_| {})
    }

    /// One that is over.
    pub(crate) fn expired(&self, name: &str) -> Leaf {
        self.signed(name, &KeyPair::generate().unwrap(), |params| {
            params.not_after = date_time_ymd(2020, 1, 1)
        })
    }

    /// One that is good for servers alone.
    pub(crate) fn server(&self, name: &str) -> Leaf {
        self.signed(name, &KeyPair::generate().unwrap(), |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        })
    }

    /// One that no CA has signed.
    pub(crate) fn self_signed(name: &str) -> Leaf {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_string()]).unwrap();
        Leaf { chain: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
    }

    fn signed(&self, name: &str, key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = CertificateParams::new(vec![name.to_string()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let chain = params.signed_by(key, &self.issuer).unwrap().pem();
        Leaf { chain, key: key.serialize_pem() }
    }
}
