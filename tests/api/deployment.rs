//! The files below `deploy`: that they can be read, and that they say the same as the crate and
//! docs/deploy.md do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use replite::lease::Lease;
use serde_json::Value;

const PAGE: &str = include_str!("../../docs/deploy.md");
/// What `Db::shutdown` promises as the longest, in seconds.
const END_SECONDS: u64 = 45;
const PROBES: [&str; 3] = ["/livez", "/readyz", "/metrics"];

type Environment = BTreeMap<String, String>;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(directory().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The members that a lease's text names, once the crate has understood it.
fn members(of: &Environment) -> Vec<String> {
    let text = &of["REPLITE_LEASE"];
    text.parse::<Lease>().unwrap_or_else(|error| panic!("{text}: {error}"));
    text.strip_prefix("members:").unwrap().split(',').map(str::to_string).collect()
}

/// What all files must say of each of the three instances.
fn check(name: &str, instances: &[Environment]) {
    let known = known();
    assert_eq!(instances.len(), 3, "{name}");
    let mut own = BTreeSet::new();
    for instance in instances {
        let members = members(instance);
        assert_eq!(members.len(), 3, "{name}");
        let listens = format!("replite://{}", instance["REPLITE_LISTEN"]);
        let url = instance.get("REPLITE_ADVERTISE_REPLICATION").unwrap_or(&listens);
        assert!(members.contains(url), "{name}: {url} is none of {members:?}");
        assert!(own.insert(url.clone()), "{name}: {url} is that of two");
        let host = |url: &str| url.split(['/', ':']).nth(3).unwrap().to_string();
        let app = &instance["REPLITE_ADVERTISE"];
        assert!(app.starts_with("http://") && app.ends_with(":8080"), "{name}: {app}");
        assert_eq!(host(app), host(url), "{name}: the application is on another host");
        for variable in instance.keys().filter(|name| name.starts_with("REPLITE_")) {
            assert!(known.contains(variable), "{name}: {variable} is not in docs/deploy.md");
        }
        for variable in ["REPLITE_PATH", "REPLITE_CLUSTER", "REPLITE_LISTEN"] {
            assert!(instance.contains_key(variable), "{name}: {variable} is missing");
        }
        let path = &instance["REPLITE_PATH"];
        assert!(path.starts_with('/') && path.ends_with("/app.db"), "{name}: {path}");
    }
}

/// The variables in the table of the page.
fn known() -> BTreeSet<String> {
    let rows = PAGE.lines().filter_map(|line| line.strip_prefix("| `REPLITE_"));
    rows.map(|row| format!("REPLITE_{}", row.split('`').next().unwrap())).collect()
}

/// By the table in the documentation of `Config::from_env`.
#[test]
fn the_crate_reads_each_variable_of_the_page() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/db/config/env.rs");
    let source = std::fs::read_to_string(source).unwrap();
    let known = known();
    assert!(known.len() >= 6, "{known:?}");
    for variable in known {
        let name = variable.strip_prefix("REPLITE_").unwrap();
        let row = format!("/// | `{name}`");
        assert!(source.contains(&row), "{variable} is not in the table of `Config::from_env`");
    }
}

/// Variables of `NAME=value` lines.
fn variables(text: &str) -> Environment {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let pair = |line: &str| {
        let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("no variable: {line}"));
        (name.to_string(), value.to_string())
    };
    lines.map(pair).collect()
}

#[test]
fn three_machines_with_systemd() {
    let first = variables(&read("systemd/app.env"));
    let of = |number: u8| -> Environment {
        // As the file's comment says: the second part is each machine's own.
        let own = |(name, value): (&String, &String)| match &**name {
            "REPLITE_LISTEN" | "REPLITE_ADVERTISE" => {
                (name.clone(), value.replace("10.0.0.1", &format!("10.0.0.{number}")))
            }
            _ => (name.clone(), value.clone()),
        };
        first.iter().map(own).collect()
    };
    check("systemd", &[of(1), of(2), of(3)]);
    let unit = read("systemd/app.service");
    let setting = |name: &str| {
        let found = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("{name} is missing"))
    };
    assert!(setting("TimeoutStopSec").parse::<u64>().unwrap() >= END_SECONDS);
    assert_eq!(setting("KillSignal"), "SIGTERM");
    assert_eq!(setting("Restart"), "always");
    let state = format!("/var/lib/{}/", setting("StateDirectory"));
    assert!(first["REPLITE_PATH"].starts_with(&state), "the database is not where the unit may write");
    assert!(!first.contains_key("REPLITE_SECRET"), "the secret is in a file of its own");
    assert!(unit.contains("EnvironmentFile=/etc/app/secret.env"));
}

#[test]
fn three_containers_with_compose() {
    let compose: Value = serde_saphyr::from_str(&read("compose/compose.yaml")).unwrap();
    let services = compose["services"].as_object().unwrap();
    let (mut instances, mut volumes, mut ports) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for (name, service) in services {
        let environment = service["environment"].as_object().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let environment: Environment =
            environment.iter().map(|(name, value)| (name.clone(), text(value))).collect();
        // The names of services are the names of hosts.
        assert_eq!(environment["REPLITE_ADVERTISE"], format!("http://{name}:8080"));
        let grace = service["stop_grace_period"].as_str().unwrap();
        assert!(grace.strip_suffix('s').unwrap().parse::<u64>().unwrap() >= END_SECONDS, "{name}");
        assert_eq!(service["stop_signal"], "SIGTERM", "{name}");
        assert_eq!(service["env_file"], serde_json::json!(["secret.env"]), "{name}");
        probed(service["healthcheck"]["test"].as_array().unwrap().last().unwrap());
        let volume = service["volumes"][0].as_str().unwrap();
        let (volume, at) = volume.split_once(':').unwrap();
        assert!(Path::new(&environment["REPLITE_PATH"]).starts_with(at), "{name}");
        assert!(compose["volumes"].as_object().unwrap().contains_key(volume), "{name}");
        assert!(volumes.insert(volume.to_string()), "{name}: two instances have one volume");
        let port = service["ports"][0].as_str().unwrap();
        assert!(port.starts_with("127.0.0.1:") && port.ends_with(":8080"), "{name}: {port}");
        assert!(ports.insert(port.to_string()), "{name}");
        instances.push(environment);
    }
    check("compose", &instances);
}

/// A probe that is asked for is one of ours.
fn probed(url: &Value) {
    let url = url.as_str().unwrap();
    let path = url.find("8080").map_or(url, |at| &url[at + 4..]);
    assert!(PROBES.contains(&path), "{url} is no probe");
}

/// The object of a kind and a name.
fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let is = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    objects.iter().find(is).unwrap_or_else(|| panic!("no {kind} {name}"))
}

#[test]
fn three_pods_of_a_stateful_set() {
    let objects: Vec<Value> = serde_saphyr::from_multiple(&read("kubernetes/app.yaml")).unwrap();
    assert!(objects.iter().all(|object| object["apiVersion"].is_string()), "{objects:?}");
    let set = &object(&objects, "StatefulSet", "app")["spec"];
    let service = set["serviceName"].as_str().unwrap();
    let headless = &object(&objects, "Service", service)["spec"];
    assert_eq!(
        (&headless["clusterIP"], &headless["publishNotReadyAddresses"]),
        (&"None".into(), &true.into())
    );
    let pod = &set["template"]["spec"];
    let container = &pod["containers"][0];
    let environment = |number: u64| -> Environment {
        let values = container["env"].as_array().unwrap().iter();
        let pairs = values.filter_map(|variable| {
            let value = variable["value"].as_str()?.replace("$(POD_NAME)", &format!("app-{number}"));
            Some((variable["name"].as_str()?.to_string(), value))
        });
        pairs.collect()
    };
    let replicas = set["replicas"].as_u64().unwrap();
    let instances: Vec<_> = (0..replicas).map(environment).collect();
    check("kubernetes", &instances);
    // `$(POD_NAME)` is there only for what comes after it.
    assert_eq!(container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"], "metadata.name");
    let of_pods = instances[0]["REPLITE_ADVERTISE"].contains(&format!("app-0.{service}:"));
    assert!(of_pods, "pods have no other names");
    let pause = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
    assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() >= END_SECONDS + pause);
    for (probe, path) in
        [("livenessProbe", "/livez"), ("startupProbe", "/livez"), ("readinessProbe", "/readyz")]
    {
        assert_eq!(container[probe]["httpGet"]["path"], path, "{probe}");
        assert_eq!(container[probe]["httpGet"]["port"], "http", "{probe}");
    }
    probed(&set["template"]["metadata"]["annotations"]["prometheus.io/path"]);
    let mounted = container["volumeMounts"].as_array().unwrap().iter();
    let data = mounted.clone().find(|mount| mount["name"] == "data").unwrap();
    assert!(Path::new(&instances[0]["REPLITE_PATH"]).starts_with(data["mountPath"].as_str().unwrap()));
    assert_eq!(set["volumeClaimTemplates"][0]["metadata"]["name"], "data");
    let labels = &set["template"]["metadata"]["labels"];
    assert_eq!(&set["selector"]["matchLabels"], labels);
    for (kind, name, at) in [
        ("Service", "app", "/spec/selector"),
        ("Service", "app-clients", "/spec/selector"),
        ("PodDisruptionBudget", "app", "/spec/selector/matchLabels"),
        ("NetworkPolicy", "app", "/spec/podSelector/matchLabels"),
    ] {
        assert_eq!(object(&objects, kind, name).pointer(at), Some(labels), "{kind} {name}");
    }
    assert_eq!(object(&objects, "PodDisruptionBudget", "app")["spec"]["maxUnavailable"], 1);
}

#[test]
fn three_machines_on_fly() {
    let fly: Value = toml::from_str(&read("fly/fly.toml")).unwrap();
    let (app, environment) = (fly["app"].as_str().unwrap(), fly["env"].as_object().unwrap());
    let common: Environment =
        environment.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_string())).collect();
    let ids = members(&common).into_iter().map(|url| {
        let (id, _) = url.strip_prefix("replite://").unwrap().split_once('.').unwrap();
        id.to_string()
    });
    let instances: Vec<Environment> = ids.map(|id| started(&common, app, &id)).collect();
    check("fly", &instances);
    assert!(Path::new(&common["REPLITE_PATH"]).starts_with(fly["mounts"]["destination"].as_str().unwrap()));
    let limit = fly["kill_timeout"].as_str().unwrap().strip_suffix('s').unwrap();
    assert!(limit.parse::<u64>().unwrap() >= END_SECONDS);
    assert_eq!((&fly["kill_signal"], &fly["deploy"]["strategy"]), (&"SIGTERM".into(), &"rolling".into()));
    let http = &fly["http_service"];
    assert_eq!((&http["internal_port"], &http["auto_stop_machines"]), (&8080.into(), &"off".into()));
    probed(&http["checks"][0]["path"]);
    probed(&fly["metrics"]["path"]);
}

/// What the start script of a Machine gives to the application. It is run here, with a program in
/// the application's place that prints its environment.
fn started(common: &Environment, app: &str, id: &str) -> Environment {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("app");
    std::fs::write(&program, "#!/bin/sh\necho \"ADDRESS=$1\"\nexec env\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode).unwrap();
    let script = directory().join("fly/start.sh");
    let output = Command::new("sh")
        .arg(script)
        .env_clear()
        .envs(common)
        .env("PATH", "/usr/bin:/bin")
        .envs([("FLY_MACHINE_ID", id), ("FLY_APP_NAME", app), ("FLY_REGION", "ams")])
        .env("APP", &program)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = variables(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(told["ADDRESS"], "[::]:8080");
    told
}

#[test]
fn the_page_names_each_file_and_no_other() {
    let mut all = BTreeSet::new();
    for folder in std::fs::read_dir(directory()).unwrap() {
        for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
            // Made by a script, for this machine alone.
            if !name.ends_with("secret.env") {
                all.insert(name.to_str().unwrap().to_string());
            }
        }
    }
    let named = PAGE.split(['`', '(', ')']).map(|word| word.trim_start_matches("../"));
    let named: BTreeSet<String> =
        named.filter(|word| word.starts_with("deploy/")).map(str::to_string).collect();
    assert_eq!(named, all);
}
