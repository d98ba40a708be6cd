//! Settings and the files they are made of.

use super::*;
use crate::tests::layers::{Authority, Folder, replace};

fn simple(roots: &Arc<str>) -> ClientTls {
    ClientTls {
        mode: ClientTlsMode::Simple,
        sni: None,
        subject_alt_names: Vec::new(),
        client_certificate: None,
        ca_certificates: Some(Arc::clone(roots)),
        ca_crl: None,
        credential_name: None,
        insecure_skip_verify: false,
    }
}

#[test]
fn a_file_that_changes_is_read_again_and_one_that_breaks_leaves_what_was() {
    let folder = Folder::new();
    let (origination, start) = (Origination::new(&folder.0), Instant::now());
    let roots = folder.file("ca.pem", &Authority::new("first").pem);
    let tls = simple(&roots);
    let id = |seconds| {
        let at = start + Duration::from_secs(seconds);
        origination
            .ready_at(&tls, Inside::Http1, None, at)
            .map(|ready| ready.id)
            .map_err(|error| error.to_string())
    };
    let first = id(0).unwrap();
    assert_eq!(id(10), Ok(first), "nothing has changed");
    replace(&roots, &Authority::new("second").pem);
    assert_eq!(id(10), Ok(first), "looked at this second already");
    let second = id(11).unwrap();
    assert_ne!(second, first);
    replace(&roots, "half a fi");
    assert_eq!(id(20), Ok(second));
    let failed = {
        let known = origination.known.lock().unwrap();
        known.all.values().next().unwrap().failed.clone().unwrap().to_string()
    };
    assert!(failed.contains("ca.pem has no certificate"), "{failed}");
    std::fs::remove_file(&*roots).unwrap();
    assert_eq!(id(30), Ok(second));
    replace(&roots, &Authority::new("third").pem);
    assert!(id(40).unwrap() > second);
}

#[test]
fn what_cannot_be_used_is_told_with_its_reason_once_somebody_wanted_it() {
    let folder = Folder::new();
    let origination = Origination::new(&folder.0);
    let at = |name: &str| -> Arc<str> { folder.0.join(name).to_str().unwrap().into() };
    let said = |tls: &ClientTls| {
        origination.unusable(tls, None).map(|(error, used)| (crate::connect::report(&error), used))
    };
    let missing = simple(&at("missing.pem"));
    assert_eq!(said(&missing), None, "nobody has asked for it");
    replace(&at("empty.pem"), "no certificate at all");
    for (tls, wanted) in [
        (missing, "missing.pem: No such file"),
        (simple(&at("../outside.pem")), "--tls-files"),
        (simple(&at("empty.pem")), "empty.pem has no certificate in PEM"),
        (ClientTls { credential_name: Some("s".into()), ..simple(&at("x")) }, "without workloadSelector"),
    ] {
        assert!(origination.ready(&tls, Inside::Http1, None).is_err());
        let (text, used) = said(&tls).unwrap();
        assert!(text.contains(wanted) && !used, "{text}");
        assert_eq!(said(&ClientTls { sni: Some("a.com".into()), ..tls }), Some((text, false)));
    }
    let good = simple(&folder.file("ca.pem", &Authority::new("good").pem));
    assert!(origination.ready(&good, Inside::Bytes, None).is_ok());
    assert_eq!(said(&good), None);
}

#[test]
fn a_file_that_comes_later_is_found() {
    let folder = Folder::new();
    let (origination, start) = (Origination::new(&folder.0), Instant::now());
    let path: Arc<str> = folder.0.join("ca.pem").to_str().unwrap().into();
    let tls = simple(&path);
    let error = origination.ready_at(&tls, Inside::Bytes, None, start).unwrap_err();
    assert!(error.to_string().contains("ca.pem"), "{error}");
    replace(&path, &Authority::new("late").pem);
    assert!(origination.ready_at(&tls, Inside::Bytes, None, start + LOOK).is_ok());
}

#[test]
fn settings_that_differ_are_not_shared_and_the_server_name_is_none_of_them() {
    let folder = Folder::new();
    let origination = Origination::new(&folder.0);
    let roots = folder.file("ca.pem", &Authority::new("root").pem);
    let id = |tls: &ClientTls, inside| origination.ready(tls, inside, None).unwrap().id;
    let tls = simple(&roots);
    let first = id(&tls, Inside::Http1);
    assert_eq!(id(&ClientTls { sni: Some("a.b".into()), ..tls.clone() }, Inside::Http1), first);
    assert_ne!(id(&tls, Inside::Http2), first);
    assert_ne!(id(&ClientTls { insecure_skip_verify: true, ..tls }, Inside::Http1), first);
}

#[test]
fn a_name_is_the_policys_else_the_hosts_and_may_be_an_address() {
    let tls = simple(&"/ca.pem".into());
    let name =
        |tls: &ClientTls, host: &str| server_name(tls, host).map(|name| name.to_str().into_owned()).ok();
    assert_eq!(name(&tls, "a.example.com").as_deref(), Some("a.example.com"));
    assert_eq!(name(&tls, "[fd00::1]").as_deref(), Some("fd00::1"));
    assert_eq!(name(&tls, ""), None);
    let named = ClientTls { sni: Some("b.example.com".into()), ..tls };
    assert_eq!(name(&named, "").as_deref(), Some("b.example.com"));
}

#[test]
fn a_file_that_is_no_file_or_without_pem_is_an_error_that_names_it() {
    let folder = Folder::new();
    for path in [folder.0.to_str().unwrap(), &folder.file("empty.pem", "")] {
        let error =
            Origination::new(&folder.0).ready(&simple(&path.into()), Inside::Bytes, None).unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[test]
fn files_are_read_from_one_folder_only() {
    let (outer, authority) = (Folder::new(), Authority::new("root"));
    let outside = outer.file("outside.pem", &authority.pem);
    let inner = outer.0.join("inner");
    std::fs::create_dir_all(inner.join("..2026")).unwrap();
    std::fs::write(inner.join("..2026/ca.pem"), &authority.pem).unwrap();
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, inner.join(name)).unwrap();
    // As mounted Secrets are.
    link("..2026", "..data");
    link("..data/ca.pem", "ca.pem");
    link("../outside.pem", "up.pem");
    link(&outside, "away.pem");
    let origination = Origination::new(&inner);
    let made = |path: &str| {
        let made = origination.ready(&simple(&path.into()), Inside::Bytes, None);
        made.map(|_| ()).map_err(|error| error.to_string())
    };
    let below = |name: &str| inner.join(name).to_str().unwrap().to_owned();
    for good in ["ca.pem", "..2026/ca.pem", &below("ca.pem"), &below("..data/ca.pem")] {
        assert_eq!(made(good), Ok(()), "{good}");
    }
    let others = ["../outside.pem", &*outside, "/etc/passwd", "/dev/zero", "/proc/self/environ"];
    for bad in
        others.map(str::to_owned).into_iter().chain(["../outside.pem", "up.pem", "away.pem"].map(below))
    {
        let error = made(&bad).unwrap_err();
        assert!(error.contains("--tls-files") && error.contains(&bad), "{bad}: {error}");
    }
}

#[test]
fn a_secret_counts_as_it_is_now_and_without_one_nothing_is_spoken() {
    let (folder, start) = (Folder::new(), Instant::now());
    let origination = Origination::new(&folder.0);
    let tls = ClientTls {
        credential_name: Some("shop/client".into()),
        ca_certificates: None,
        ..simple(&"unused".into())
    };
    let credential =
        |content| Arc::new(Credential { node: "a".into(), name: Name::new("shop", "client"), content });
    let with =
        |pem: &str| credential(Ok(Material { roots: Some(pem.as_bytes().into()), ..Material::default() }));
    let ready = |credential: Option<&Arc<Credential>>| {
        let made = origination.ready_at(&tls, Inside::Http1, credential, start);
        made.map(|ready| ready.id).map_err(|error| crate::connect::report(&error))
    };
    let refused = |credential: Option<&Arc<Credential>>, wanted: &str| {
        let why = ready(credential).unwrap_err();
        assert!(why.contains(wanted), "{why}");
        let (told, before_in_use) = origination.unusable(&tls, credential).unwrap();
        assert_eq!((crate::connect::report(&told), before_in_use), (why, false));
    };
    refused(None, "the controller has not sent it");
    let first = with(&Authority::new("first").pem);
    let id = ready(Some(&first)).unwrap();
    assert_eq!(ready(Some(&first)), Ok(id));
    // At once, not when files are looked at again.
    let second = with(&Authority::new("second").pem);
    assert!(ready(Some(&second)).unwrap() > id);
    // What was read before is not used any more, whatever takes its place.
    refused(
        Some(&credential(Err("there is no Secret shop/client".into()))),
        "there is no Secret shop/client",
    );
    refused(Some(&with("half a cert")), "Secret shop/client has no certificate in PEM");
    refused(Some(&credential(Ok(Material::default()))), "no ca.crt");
    refused(None, "the controller has not sent it");
    let mutual = ClientTls { mode: ClientTlsMode::Mutual, ..tls.clone() };
    let error = origination.ready(&mutual, Inside::Http1, Some(&second)).unwrap_err();
    assert!(error.to_string().contains("no client certificate"), "{error}");
    assert!(ready(Some(&second)).is_ok());
}
