//! `baggage`: what a client's agent says of the client, for telemetry. The keys are ztunnel's.

use std::fmt;

use mesh_core::snapshot::Workload;

use super::{HEADER_BYTES_MAX, HeaderError, canonical::Canonical};

/// Most members that are read; W3C asks for 64.
pub const MEMBERS_MAX: usize = 180;
/// Longest value that is kept, in bytes; longer ones are no name of anything in Kubernetes.
pub const VALUE_BYTES_MAX: usize = 512;

/// What is said; `None` for what is not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Option<String>,
    /// `k8s.namespace.name`.
    pub namespace: Option<String>,
    /// `k8s.KIND.name`.
    pub workload: Option<(WorkloadKind, String)>,
    /// `service.name`: the canonical service.
    pub service: Option<String>,
    /// `service.version`: the canonical revision.
    pub revision: Option<String>,
    /// `cloud.region`.
    pub region: Option<String>,
    /// `cloud.availability_zone`.
    pub zone: Option<String>,
}

/// Kind of a workload's owner, as baggage names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A Job.
    Job,
    /// A pod without an owner that is known.
    Pod,
}

impl WorkloadKind {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Deployment, "k8s.deployment.name"),
        (Self::CronJob, "k8s.cronjob.name"),
        (Self::Job, "k8s.job.name"),
        (Self::Pod, "k8s.pod.name"),
    ];

    fn key(self) -> &'static str {
        Self::ALL.into_iter().find(|(kind, _)| *kind == self).map_or("k8s.pod.name", |(_, key)| key)
    }

    fn of(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == key).map(|(kind, _)| kind)
    }
}

impl Baggage {
    /// What our agents say of a pod.
    pub fn of(pod: &Workload, cluster: &str) -> Self {
        let canonical = Canonical::of(pod);
        Self {
            cluster: Some(cluster.to_owned()),
            namespace: Some(pod.name.namespace.to_string()),
            workload: Some((WorkloadKind::Pod, pod.name.name.to_string())),
            service: Some(canonical.service.to_owned()),
            revision: Some(canonical.revision.to_owned()),
            region: None,
            zone: None,
        }
    }

    /// Reads all values of the header. Of a key that is said twice the last value counts; unknown keys, empty values and
    /// members that are none are skipped.
    ///
    /// # Errors
    /// The values are too long together, or not ASCII.
    pub fn parse<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, HeaderError> {
        let mut baggage = Self::default();
        let (mut bytes, mut members) = (0, 0);
        for value in values {
            bytes += value.len();
            if bytes > HEADER_BYTES_MAX {
                return Err(HeaderError::TooLong);
            }
            if !value.is_ascii() {
                return Err(HeaderError::Bytes);
            }
            let text = std::str::from_utf8(value).map_err(|_| HeaderError::Bytes)?;
            for member in text.split(',') {
                members += 1;
                if members > MEMBERS_MAX {
                    return Err(HeaderError::TooLong);
                }
                baggage.add(member);
            }
        }
        Ok(baggage)
    }

    fn add(&mut self, member: &str) {
        // `key = value ; property`
        let member = member.split(';').next().unwrap_or_default();
        let Some((key, value)) = member.split_once('=') else { return };
        let Some(value) = decode(value.trim_matches([' ', '\t'])) else { return };
        let value = Some(value).filter(|value| !value.is_empty());
        match key.trim_matches([' ', '\t']) {
            "k8s.cluster.name" => self.cluster = value,
            "k8s.namespace.name" => self.namespace = value,
            "service.name" => self.service = value,
            "service.version" => self.revision = value,
            "cloud.region" => self.region = value,
            "cloud.availability_zone" => self.zone = value,
            key => {
                if let Some(kind) = WorkloadKind::of(key) {
                    self.workload = value.map(|value| (kind, value));
                }
            }
        }
    }
}

/// Without percent signs; `None` for what is not UTF-8 or too long.
fn decode(value: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [first, tail @ ..] = rest {
        let (byte, tail) = match (first, tail) {
            (b'%', [high, low, tail @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, tail),
                _ => return None,
            },
            (b'%', _) => return None,
            (byte, tail) => (*byte, tail),
        };
        bytes.push(byte);
        rest = tail;
    }
    if bytes.len() > VALUE_BYTES_MAX || bytes.iter().any(u8::is_ascii_control) {
        return None;
    }
    String::from_utf8(bytes).ok()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload = self.workload.as_ref().map(|(kind, name)| (kind.key(), name));
        let members = [
            self.cluster.as_ref().map(|text| ("k8s.cluster.name", text)),
            self.namespace.as_ref().map(|text| ("k8s.namespace.name", text)),
            workload,
            self.service.as_ref().map(|text| ("service.name", text)),
            self.revision.as_ref().map(|text| ("service.version", text)),
            self.region.as_ref().map(|text| ("cloud.region", text)),
            self.zone.as_ref().map(|text| ("cloud.availability_zone", text)),
        ];
        for (index, (key, value)) in members.into_iter().flatten().enumerate() {
            write!(f, "{}{key}={}", if index == 0 { "" } else { "," }, Encoded(value))?;
        }
        Ok(())
    }
}

/// A value with percent signs for what may not stand in one.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'"' | b',' | b';' | b'\\' | b'%' => write!(f, "%{byte:02X}")?,
                b'!'..=b'~' => fmt::Write::write_char(f, byte.into())?,
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::Name;

    use super::*;

    fn parse(text: &str) -> Baggage {
        Baggage::parse([text.as_bytes()]).unwrap()
    }

    #[test]
    fn a_pod_is_described_as_ztunnel_does() {
        let labels = [("app".into(), "cart".into()), ("version".into(), "v2".into())].into();
        let pod = Workload { labels, ..Workload::named(Name::new("shop", "cart-1")) };
        let baggage = Baggage::of(&pod, "Kubernetes");
        let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=cart-1,service.name=cart,\
                    service.version=v2";
        assert_eq!(baggage.to_string(), text);
        assert_eq!(parse(text), baggage);
    }

    #[test]
    fn members_are_read_in_every_form_of_the_standard() {
        let text =
            " k8s.namespace.name = shop ; secret ,other=1,service.name=a%2Cb%20c,k8s.deployment.name=web";
        let expected = Baggage {
            namespace: Some("shop".into()),
            service: Some("a,b c".into()),
            workload: Some((WorkloadKind::Deployment, "web".into())),
            ..Baggage::default()
        };
        assert_eq!(parse(text), expected);
        assert_eq!(Baggage::parse(text.split(',').map(str::as_bytes)).unwrap(), expected);
        assert_eq!(parse("service.name=a,service.name=b").service, Some("b".into()));
    }

    #[test]
    fn what_is_no_member_is_skipped() {
        for text in [
            "",
            ",,,",
            "service.name",
            "service.name=",
            "service.name=%",
            "service.name=%2",
            "service.name=%zz",
            "service.name=%ff",
            "service.name=%0a",
            "=x",
            "service.NAME=x",
        ] {
            assert_eq!(parse(text), Baggage::default(), "{text}");
        }
        let long = format!("service.name={}", "a".repeat(VALUE_BYTES_MAX + 1));
        assert_eq!(parse(&long), Baggage::default());
    }

    #[test]
    fn too_much_is_refused() {
        let long = "a".repeat(HEADER_BYTES_MAX + 1);
        assert_eq!(Baggage::parse([long.as_bytes()]), Err(HeaderError::TooLong));
        let half = &long[..HEADER_BYTES_MAX / 2 + 1];
        assert_eq!(Baggage::parse([half.as_bytes(), half.as_bytes()]), Err(HeaderError::TooLong));
        let many = ",".repeat(MEMBERS_MAX);
        assert_eq!(Baggage::parse([many.as_bytes()]), Err(HeaderError::TooLong));
        assert_eq!(Baggage::parse([&b"service.name=\xc3\xa9"[..]]), Err(HeaderError::Bytes));
    }

    #[test]
    fn odd_names_survive() {
        let baggage = Baggage { service: Some("a=b;c,\"d\" é%".into()), ..Baggage::default() };
        assert_eq!(parse(&baggage.to_string()), baggage);
    }
}
