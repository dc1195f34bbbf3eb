//! Every command against a daemon with canned answers: text, JSON, exit codes.

use super::fake::*;
use super::figures::Figures;
use crate::bus::Error;
use serde_json::Value;
use std::fs;
use std::io::Read;

fn running() -> Figures {
    Figures {
        id: "3f2a91c04d7e".into(),
        name: "night".into(),
        owner: 1000,
        created_us: NOW_US - 121 * MINUTE,
        started_us: Some(NOW_US - 120 * MINUTE),
        state: "running".into(),
        step: 46,
        total_steps: Some(120),
        epoch: 0.77,
        loss: Some(1.23451),
        eval_loss: Some(1.301),
        tokens_per_second: Some(312.4),
        progress: 0.3833,
        remaining_seconds: Some(130),
        attempts: 1,
        checkpoint_step: Some(40),
        memory_bytes: 5 << 30,
        energy_j: Some(44_400.0),
        joules_per_token: Some(0.3149),
        step_energy_j: Some(42.0),
        ..Figures::default()
    }
}

fn waiting() -> Figures {
    Figures {
        id: "3f2a01020304".into(),
        name: "day\x1b[31m".into(),
        owner: 4711,
        created_us: NOW_US - 3 * MINUTE,
        state: "waiting".into(),
        reason: "inhibited".into(),
        priority: -2,
        ..Figures::default()
    }
}

fn succeeded() -> Figures {
    Figures {
        id: "aa0000000001".into(),
        name: "old".into(),
        state: "succeeded".into(),
        created_us: NOW_US - 3000 * MINUTE,
        started_us: Some(NOW_US - 2999 * MINUTE),
        finished_us: Some(NOW_US - 2900 * MINUTE),
        step: 120,
        total_steps: Some(120),
        loss: Some(0.5),
        eval_loss: Some(0.75),
        progress: 1.0,
        attempts: 1,
        ..Figures::default()
    }
}

fn world() -> World {
    World {
        runs: vec![running(), waiting(), succeeded()],
        active: Some("3f2a91c04d7e".into()),
        state: "active",
        ..World::default()
    }
}

fn json(text: &str) -> Value {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(value["schema"], 1);
    value
}

/// What a command printed, when it ended well and had nothing to say beside it.
fn clean(ran: Ran) -> String {
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
    ran.out
}

const NIGHT: &str = r#"{"id":"3f2a91c04d7e","name":"night","owner":1000,"state":"running","reason":null,"priority":0,"created_us":1699992740000000,"started_us":1699992800000000,"finished_us":null,"step":46,"total_steps":120,"epoch":0.77,"loss":1.23451,"eval_loss":1.301,"tokens_per_second":312.4,"progress":0.3833,"remaining_seconds":130,"attempts":1,"checkpoint_step":40,"memory_bytes":5368709120,"energy_j":44400.0,"energy_above_idle_j":null,"joules_per_token":0.3149,"step_energy_j":42.0,"deadline_us":null,"deadline_at_risk":false}"#;

#[tokio::test]
async fn list() {
    let bench = Bench::new(world()).await;
    assert_eq!(
        clean(bench.run(&["list"]).await),
        "\
ID     NAME           STATE                DONE   STEP     LOSS    EVAL    OWNER  AGE
3f2a9  night          running              38 %   46/120   1.2345  1.3010  robot  2 h
3f2a0  day\\u{1b}[31m  waiting (inhibited)  0 %    0        -       -       4711   3 min
aa000  old            succeeded            100 %  120/120  0.5000  0.7500  root   2 d
"
    );
    let unfinished = bench.run(&["list", "--unfinished"]).await;
    assert_eq!(unfinished.out.lines().count(), 3);
    assert_eq!(unfinished.err, "1 run over and not shown; --all shows them\n");
    let runs = json(&clean(bench.run(&["list", "--all", "--json"]).await));
    assert_eq!(runs["runs"][0].to_string(), NIGHT);
    assert_eq!(runs["runs"][1]["name"], "day\x1b[31m");
    assert!(runs["runs"][1]["loss"].is_null() && runs["runs"][1]["checkpoint_step"].is_null());
    assert_eq!(runs["runs"].as_array().unwrap().len(), 3);
    let empty = Bench::new(World::default()).await.run(&["list"]).await;
    assert_eq!((empty.code, empty.out.as_str()), (0, ""));
    assert_eq!(empty.err, "no runs; submit one with: finetunectl submit SPEC\n");
}

const NIGHT_PAGE: &str = "\
● night (3f2a91c04d7e)
       State: running
    Progress: step 46 of 120 (38 %), epoch 0.77
        Loss: 1.2345, 1.3010 held out
       Speed: 312 tok/s, 2 min 10 s left
      Energy: 12.3 Wh, 0.31 J/token, 42 J in the last step
  Checkpoint: step 40
      Memory: 5.0 GiB
    Attempts: 1
    Priority: 0
       Owner: robot
   Submitted: 2023-11-14 20:12:20 (2 h 1 min ago)
     Started: 2023-11-14 20:13:20 (2 h 0 min ago)
";

#[tokio::test]
async fn show() {
    let bench = Bench::new(world()).await;
    let others = bench.run(&["show", "night"]).await;
    assert_eq!((others.code, others.out.as_str()), (0, NIGHT_PAGE));
    assert_eq!(others.err, "spec, directory and failure are shown to the owner only\n");
    let object = json(&bench.run(&["show", "night", "--json"]).await.out);
    assert_eq!((object["run"].to_string().as_str(), object["details"].is_null()), (NIGHT, true));
    assert_eq!(bench.run(&["show", "night", "--spec"]).await.code, 5);

    bench.shared.world().details = Some(vec![
        ("Message", "it broke:\n\x1b[2Jhere".into()),
        ("Spec", "[run]\n".into()),
        ("ResolvedSpec", "[run]\nname = \"night\"\n".into()),
        ("Model", "qwen3".into()),
        ("Directory", "/var/lib/finetuned/runs/3f2a91c04d7e".into()),
        ("Summary", r#"{"steps":120,"trainable":460800,"best_step":null}"#.into()),
    ]);
    let page = clean(bench.run(&["show", "3f2a9"]).await);
    let own = "       Model: qwen3
   Directory: /var/lib/finetuned/runs/3f2a91c04d7e
     Message: it broke:
              \\u{1b}[2Jhere
     Summary: steps 120
              trainable 460800
";
    assert_eq!(page, format!("{NIGHT_PAGE}{own}"));
    let object = json(&clean(bench.run(&["show", "night", "--json"]).await));
    assert_eq!(object["details"]["summary"]["trainable"], 460800);
    assert_eq!(object["details"]["message"], "it broke:\n\x1b[2Jhere");
    assert_eq!(clean(bench.run(&["show", "night", "--resolved"]).await), "[run]\nname = \"night\"\n");
    assert_eq!(json(&clean(bench.run(&["show", "night", "--spec", "--json"]).await))["spec"], "[run]\n");
}

#[tokio::test]
async fn status() {
    let bench = Bench::new(world()).await;
    assert_eq!(
        clean(bench.run(&["status"]).await),
        "\
● finetuned 0.1.0
   State: active
  Device: CPU (2 threads)
     Run: night (3f2a91c04d7e)
          running  38 %  46/120  loss 1.2345  eval 1.3010  312 tok/s  2 min 10 s left
   Queue: 1 run
"
    );
    {
        let mut world = bench.shared.world();
        world.active = None;
        (world.state, world.reason) = ("waiting", "inhibited");
        world.inhibitors = vec![("dock\x07".into(), "docking".into(), 1000, NOW_US - 5 * MINUTE)];
        world.notes = vec!["the kernel throttles".into(), "tj \x1b cannot be read".into()];
    }
    assert_eq!(
        clean(bench.run(&["status"]).await),
        "\
● finetuned 0.1.0
    State: waiting (inhibited): somebody holds all training
   Device: CPU (2 threads)
    Notes: the kernel throttles
           tj \\u{1b} cannot be read
      Run: none has the device
    Queue: 2 runs
  Held by: dock\\u{7} (robot): docking, since 2023-11-14 22:08:20 (5 min 0 s ago)
"
    );
    assert_eq!(
        clean(bench.run(&["status", "--json"]).await),
        "{\"schema\":1,\"version\":\"0.1.0\",\"state\":\"waiting\",\"reason\":\"inhibited\",\
         \"device\":\"CPU (2 threads)\",\"active_run\":null,\"unfinished_runs\":2,\"governor\":null,\"notes\":\
         [\"the kernel throttles\",\"tj \\u001b cannot be read\"],\"inhibitors\":[{\"who\":\
         \"dock\\u0007\",\"why\":\"docking\",\"uid\":1000,\"since_us\":1699999700000000}]}\n"
    );
}

fn limited() -> World {
    let entry = |key, value: &str, files, source| (key, value.to_string(), files, source);
    World {
        budget: vec![
            entry("budget.temperature", "85", "85", "default"),
            entry("budget.power", "\"30W\"", "\"30W\"", "file"),
            entry("window.times", "[\"22:00-06:00\"]", "[]", "set"),
            entry("window.quiet", "[]", "[]", "default"),
        ],
        ..world()
    }
}

#[tokio::test]
async fn budget() {
    let bench = Bench::new(limited()).await;
    assert_eq!(
        clean(bench.run(&["budget", "show"]).await),
        "\
KEY                 VALUE        FROM
budget.temperature  85 °C        default
budget.power        30 W         /etc/finetuned/finetuned.toml:3
window.times        22:00-06:00  set by robot 2023-11-14 22:08:20, 5 min 0 s ago
window.quiet        never        default
"
    );
    assert_eq!(clean(bench.run(&["budget", "show", "power", "window"]).await).lines().count(), 4);
    let shown = json(&clean(bench.run(&["budget", "show", "window.times", "--json"]).await));
    assert_eq!(
        shown["budget"][0].to_string(),
        r#"{"key":"window.times","value":["22:00-06:00"],"default":"none","files":[],"source":"set","place":null,"uid":1000,"time_us":1699999700000000}"#
    );
    bench.shared.world().notes = vec!["it is \x1b blind".into()];
    assert_eq!(bench.run(&["budget", "show"]).await.err, "note: it is \\u{1b} blind\n");
    bench.shared.world().notes.clear();
    let typo = bench.run(&["budget", "show", "pwoer"]).await;
    assert_eq!(typo.code, 2);
    assert_eq!(
        typo.err,
        "error: the budget has no key \"pwoer\"\n\
         help: did you mean power? `finetunectl budget show` lists every key\n"
    );

    assert_eq!(
        clean(bench.run(&["budget", "set", "power=25W", "budget.temperature = 85"]).await),
        "budget.temperature: 85 °C → 85\nbudget.power: 30 W → 25 W\n"
    );
    let set = json(&clean(bench.run(&["budget", "set", "power=20W", "--runtime", "--json"]).await));
    assert_eq!((&set["budget"][0]["value"], &set["budget"][0]["source"]), (&"20W".into(), &"runtime".into()));
    assert_eq!(clean(bench.run(&["budget", "reset", "power"]).await), "budget.power: 20 W → 30 W\n");
    assert_eq!(
        clean(bench.run(&["budget", "reset"]).await),
        "budget.temperature: 85 → 85 °C\nwindow.times: 22:00-06:00 → always\n"
    );
    let nothing = bench.run(&["budget", "reset", "--yes"]).await;
    assert_eq!((nothing.code, nothing.err.as_str()), (0, "nothing was set\n"));
    assert_eq!(
        bench.shared.world().calls.join("\n"),
        "SetBudget [(\"budget.power\", \"25W\"), (\"budget.temperature\", \"85\")] runtime=false\n\
         SetBudget [(\"budget.power\", \"20W\")] runtime=true\n\
         ResetBudget [\"budget.power\"]\nResetBudget []\nResetBudget []"
    );
    for (words, said) in [
        (&["budget", "set", "power"][..], "\"power\" is no KEY=VALUE"),
        (&["budget", "set", "power=1", "budget.power=2"], "budget.power is given twice"),
        (&["budget", "set", "pwoer=1"], "the budget has no key \"pwoer\""),
        (&["budget", "reset", "pwoer"], "the budget has no key \"pwoer\""),
    ] {
        let ran = bench.run(words).await;
        assert!(ran.code == 2 && ran.err.contains(said), "{words:?}: {}", ran.err);
    }
    bench.shared.world().refusal =
        Some(|_| Error::InvalidInput("budget.powr: unknown key\nwindow: wrong".into()));
    let refused = bench.run(&["budget", "set", "budget.powr=1"]).await;
    assert_eq!(
        (refused.code, refused.err.as_str()),
        (2, "error: budget.powr: unknown key\nerror: window: wrong\n")
    );
}

#[tokio::test]
async fn orders() {
    let bench = Bench::new(world()).await;
    let ran = bench.run(&["pause", "night", "nobody", "aa"]).await;
    assert_eq!(ran.code, 4);
    assert_eq!(ran.out, "night (3f2a91c04d7e): saving (user)\nold (aa0000000001): saving (user)\n");
    assert_eq!(
        ran.err,
        "error: cannot pause nobody: there is no run nobody\n\
         help: `finetunectl list --all` shows every run; RUN is a name, an id, or the beginning of an id\n"
    );
    let ambiguous = bench.run(&["cancel", "3f2a"]).await;
    assert_eq!((ambiguous.code, ambiguous.out.as_str()), (4, ""));
    assert!(ambiguous.err.ends_with("help: give the id, or more of its digits\n"), "{}", ambiguous.err);
    assert_eq!(clean(bench.run(&["resume", "night"]).await), "night (3f2a91c04d7e): queued\n");
    assert_eq!(clean(bench.run(&["cancel", "night"]).await), "night (3f2a91c04d7e): cancelled (user)\n");
    assert_eq!(clean(bench.run(&["remove", "--yes", "night"]).await), "night (3f2a91c04d7e): removed\n");
    // Without a terminal nobody is asked.
    let removed = json(&clean(bench.run(&["remove", "old", "--json"]).await));
    assert_eq!(
        removed["runs"][0].to_string(),
        r#"{"id":"aa0000000001","name":"old","removed":true,"error":null}"#
    );
    assert_eq!(clean(bench.run(&["priority", "night", "-7"]).await), "night (3f2a91c04d7e): priority -7\n");
    assert_eq!(json(&clean(bench.run(&["priority", "night", "3", "--json"]).await))["run"]["priority"], 3);
    assert_eq!(
        clean(bench.run(&["checkpoint", "night"]).await),
        "night (3f2a91c04d7e): checkpoint at step 47\n"
    );
    assert_eq!(
        clean(bench.run(&["checkpoint", "night", "--json"]).await),
        "{\"schema\":1,\"id\":\"3f2a91c04d7e\",\"step\":47}\n"
    );
    assert_eq!(clean(bench.run(&["evaluate", "night"]).await), "night (3f2a91c04d7e): eval_loss 1.2500\n");
    assert_eq!(json(&clean(bench.run(&["evaluate", "night", "--json"]).await))["eval_loss"], 1.25);
    let calls = bench.shared.world().calls.join(", ");
    assert_eq!(
        calls,
        "Pause 3f2a91c04d7e, Pause aa0000000001, Resume 3f2a91c04d7e, Cancel 3f2a91c04d7e, Remove 3f2a91c04d7e, \
         Remove aa0000000001, SetPriority -7, SetPriority 3, Checkpoint 3f2a91c04d7e, Checkpoint 3f2a91c04d7e, \
         Evaluate 3f2a91c04d7e, Evaluate 3f2a91c04d7e"
    );
}

#[tokio::test]
async fn deadlines() {
    let bench = Bench::new(world()).await;
    // It is 22:13:20 now.
    assert_eq!(
        clean(bench.run(&["deadline", "night", "06:00"]).await),
        "night (3f2a91c04d7e): deadline 2023-11-15 06:00:00 (in 7 h 46 min)\n"
    );
    bench.shared.world().runs[0].deadline_at_risk = true;
    let page = bench.run(&["show", "night"]).await.out;
    assert!(
        page.contains(
            "    Deadline: 2023-11-15 06:00:00 (in 7 h 46 min): it will not be done by then at this pace, in the hours that \
             are left\n"
        ),
        "{page}"
    );
    let status = clean(bench.run(&["status"]).await);
    assert!(status.contains("2 min 10 s left  deadline at risk\n"), "{status}");
    assert_eq!(
        clean(bench.run(&["list"]).await),
        "\
ID     NAME           STATE                DONE   STEP     LOSS    EVAL    OWNER  AGE    DEADLINE
3f2a9  night          running              38 %   46/120   1.2345  1.3010  robot  2 h    in 7 h, at risk
3f2a0  day\\u{1b}[31m  waiting (inhibited)  0 %    0        -       -       4711   3 min  -
aa000  old            succeeded            100 %  120/120  0.5000  0.7500  root   2 d    -
"
    );
    let run = json(&clean(bench.run(&["deadline", "night", "+1h", "--json"]).await))["run"].clone();
    assert_eq!(
        (&run["deadline_us"], &run["deadline_at_risk"]),
        (&(NOW_US + 60 * MINUTE).into(), &true.into())
    );
    assert_eq!(clean(bench.run(&["deadline", "night", "none"]).await), "night (3f2a91c04d7e): no deadline\n");
    let bad = bench.run(&["deadline", "night", "soon"]).await;
    assert!(
        bad.code == 2 && bad.err.starts_with("error: \"soon\" is no moment: write a local one"),
        "{}",
        bad.err
    );
    assert_eq!(
        bench.shared.world().calls.join(", "),
        "SetDeadline 3f2a91c04d7e 1700028000000000, SetDeadline 3f2a91c04d7e 1700003600000000, SetDeadline 3f2a91c04d7e 0"
    );
}

/// Each error of the interface has its exit code, and its text and a hint reach the person.
#[tokio::test]
async fn refusals() {
    let bench = Bench::new(world()).await;
    type Refused = (fn(String) -> Error, u8, &'static str);
    let errors: [Refused; 17] = [
        (Error::NoSuchRun, 4, "NoSuchRun"),
        (Error::AmbiguousRun, 4, "AmbiguousRun"),
        (Error::NoSuchModel, 4, "NoSuchModel"),
        (Error::InvalidSpec, 2, "InvalidSpec"),
        (Error::InvalidInput, 2, "InvalidInput"),
        (Error::NotAuthorized, 5, "NotAuthorized"),
        (Error::LimitExceeded, 9, "LimitExceeded"),
        (Error::NoSpace, 1, "NoSpace"),
        (Error::AlreadyOver, 8, "AlreadyOver"),
        (Error::AlreadyPaused, 8, "AlreadyPaused"),
        (Error::NotPaused, 8, "NotPaused"),
        (Error::BeingCancelled, 8, "BeingCancelled"),
        (Error::NotActive, 1, "NotActive"),
        (Error::NotOver, 1, "NotOver"),
        (Error::Busy, 1, "Busy"),
        (Error::Failed, 1, "Failed"),
        (Error::ShuttingDown, 7, "ShuttingDown"),
    ];
    for (error, code, name) in errors {
        bench.shared.world().refusal = Some(error);
        let one = bench.run(&["checkpoint", "night"]).await;
        assert_eq!((one.code, one.out.as_str()), (code, ""), "{name}");
        assert!(one.err.starts_with("error: it is refused\n"), "{name}: {}", one.err);
        let several = bench.run(&["pause", "night", "old", "--json"]).await;
        assert_eq!(several.code, code, "{name}");
        if code != 7 {
            let object = json(&several.out);
            assert_eq!(object["runs"][1]["error"]["name"], name);
            assert_eq!(object["runs"][1]["error"]["exit_code"], code);
        }
    }
    bench.shared.world().refusal = Some(Error::NotAuthorized);
    let err = bench.run(&["model", "remove", "x"]).await.err;
    assert!(err.contains("usermod -aG finetuned") && err.contains("org.finetuned.Finetuned1."), "{err}");
}

#[tokio::test]
async fn a_daemon_that_is_gone_is_unreachable() {
    let bench = Bench::new(world()).await;
    bench.hang_up().await;
    let ran = bench.run(&["list"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (7, ""), "{}", ran.err);
    assert!(ran.err.contains("systemctl status finetuned") && ran.err.contains("--session"), "{}", ran.err);
}

/// The way through a socket, with its handshake.
#[tokio::test]
async fn a_daemon_at_an_address() {
    let bench = Bench::new(world()).await;
    let socket = bench.directory().join("peer");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let transport = super::connect::Transport::Peer(socket.display().to_string());
    let limit = std::time::Duration::from_secs(10);
    // The kernel connects before anybody accepts, so one thread can do both.
    let accepted = async {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        bench.serve(listener.accept().unwrap().0).await
    };
    let (connection, server) = tokio::join!(transport.connect(limit), accepted);
    let client = super::connect::Client::new(connection.unwrap(), limit, limit, false).await.unwrap();
    assert_eq!(client.answer(client.manager.version()).await.unwrap(), "0.1.0");
    assert_eq!(super::list::runs(&client).await.unwrap().len(), 3);
    drop(server);
}

#[tokio::test]
async fn records() {
    let bench = Bench::new(world()).await;
    bench.shared.world().metrics = "\
{\"step\":0,\"eval_loss\":5.0897}
{\"step\":1,\"epoch\":0.01,\"loss\":4.8491,\"grad_norm\":1.7,\"learning_rate\":0.0002,\"tokens\":624,\"tokens_per_second\":312.4}
{\"step\":2,\"epoch\":0.02,\"loss\":null,\"grad_norm\":null,\"learning_rate\":0.0002,\"tokens\":624,\"tokens_per_second\":312.4}
"
    .into();
    bench.shared.world().journal = format!(
        "{{\"time_us\":{NOW_US},\"kind\":\"state\",\"state\":\"queued\"}}\n\
         {{\"time_us\":{NOW_US},\"kind\":\"failure\",\"reason\":\"crashed\",\"message\":\"signal 11\"}}\n"
    );
    assert_eq!(
        clean(bench.run(&["metrics", "night"]).await),
        "eval 0 eval_loss 5.0897\nstep 1 loss 4.8491 grad_norm 1.7 lr 2.0e-4 312 tok/s\nstep 2 loss NaN lr 2.0e-4 312 tok/s\n"
    );
    assert_eq!(
        clean(bench.run(&["metrics", "night", "--csv"]).await),
        "step,epoch,loss,eval_loss,grad_norm,learning_rate,tokens,tokens_per_second\n\
         0,,,5.0897,,,,\n1,0.01,4.8491,,1.7,0.0002,624,312.4\n2,0.02,,,,0.0002,624,312.4\n"
    );
    let lines = clean(bench.run(&["metrics", "night", "--json"]).await);
    assert_eq!(lines.lines().next().unwrap(), "{\"schema\":1,\"step\":0,\"eval_loss\":5.0897}");
    assert_eq!(lines.lines().count(), 3);
    assert_eq!(
        clean(bench.run(&["logs", "night"]).await),
        "2023-11-14 22:13:20  queued\n2023-11-14 22:13:20  failure (crashed): signal 11\n"
    );
    let lines = clean(bench.run(&["logs", "night", "--json"]).await);
    assert_eq!(
        lines.lines().map(json).map(|line| line["kind"].clone()).collect::<Vec<_>>(),
        ["state", "failure"]
    );
    // Following a run that is over ends.
    assert_eq!(clean(bench.run(&["logs", "-f", "old"]).await).lines().count(), 2);
}

#[tokio::test]
async fn following_ends_with_the_run() {
    let bench = Bench::new(world()).await;
    bench.shared.world().journal = "{\"kind\":\"x\"}\n".into();
    let end = async {
        bench.looked_at().await;
        bench.change(|run| run.state = "succeeded".into()).await;
    };
    let (ran, ()) = tokio::join!(bench.run(&["logs", "-f", "night"]), end);
    assert_eq!((ran.code, ran.out.as_str()), (0, "{\"kind\":\"x\"}\n"));
}

#[tokio::test]
async fn watch_to_the_end() {
    let bench = Bench::new(world()).await;
    let night = async {
        bench.looked_at().await;
        bench.change(|run| (run.step, run.loss) = (47, Some(1.1))).await;
        bench.change(|run| (run.state, run.reason) = ("waiting".into(), "inhibited".into())).await;
        bench.change(|run| (run.state, run.reason, run.step) = ("running".into(), String::new(), 120)).await;
        bench
            .change(|run| {
                run.state = "succeeded".into();
                run.finished_us = Some(NOW_US);
                run.remaining_seconds = None;
            })
            .await;
    };
    let (ran, ()) = tokio::join!(bench.run(&["watch"]), night);
    assert_eq!(
        ran.out,
        "\
running  46/120  loss 1.2345  eval 1.3010  312 tok/s  2 min 10 s left
waiting (inhibited)  47/120  loss 1.1000  eval 1.3010  312 tok/s  2 min 10 s left
running  120/120  loss 1.1000  eval 1.3010  312 tok/s  2 min 10 s left
succeeded  120/120  loss 1.1000  eval 1.3010  312 tok/s
night (3f2a91c04d7e) succeeded: 120 steps, loss 1.1000, held out 1.3010, 2 h 0 min after its start, 12.3 Wh
"
    );
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (0, "fetch its adapter with: finetunectl adapter export 3f2a91c04d7e DIR\n")
    );
}

#[tokio::test]
async fn watch_of_a_failure() {
    let bench = Bench::new(world()).await;
    bench.shared.world().details = Some(vec![("Message", "step 47: the loss is NaN".into())]);
    let night = async {
        bench.looked_at().await;
        bench.change(|run| (run.state, run.reason) = ("failed".into(), "diverged".into())).await;
    };
    let (ran, ()) = tokio::join!(bench.run(&["watch", "night", "--json"]), night);
    assert_eq!(ran.code, 3);
    let states: Vec<Value> = ran.out.lines().map(|line| json(line)["run"]["state"].clone()).collect();
    assert_eq!(states, ["running", "failed"]);
    assert_eq!(
        ran.err,
        "error: night (3f2a91c04d7e) failed (diverged)\n  because: step 47: the loss is NaN\n\
         help: what happened, in order: finetunectl logs 3f2a91c04d7e\n"
    );
    let over = bench.run(&["wait", "night"]).await;
    assert_eq!((over.code, over.err), (3, ran.err));
}

#[tokio::test]
async fn ctrl_c_leaves_the_run_alone() {
    let bench = Bench::new(world()).await;
    let interrupt = async {
        bench.looked_at().await;
        bench.interrupt.notify_one();
    };
    let (ran, ()) = tokio::join!(bench.run(&["watch"]), interrupt);
    let again = "night (3f2a91c04d7e) goes on; watch it again with: finetunectl watch 3f2a91c04d7e\n";
    assert_eq!((ran.code, ran.err.as_str()), (130, again));
    bench.interrupt.notify_one();
    let ran = bench.run(&["wait", "night"]).await;
    assert_eq!((ran.code, ran.err.as_str()), (130, again));
    bench.interrupt.notify_one();
    assert_eq!(bench.run(&["logs", "-f", "night"]).await.code, 130);
    assert!(!bench.shared.world().calls.iter().any(|call| call.contains("Cancel")));
}

#[tokio::test]
async fn wait() {
    let bench = Bench::new(world()).await;
    let cancelled = async {
        bench.looked_at().await;
        bench.change(|run| run.state = "cancelled".into()).await;
    };
    let (ran, ()) = tokio::join!(bench.run(&["wait", "night", "--json"]), cancelled);
    assert_eq!((ran.code, ran.err.as_str()), (10, "error: night (3f2a91c04d7e) was cancelled\n"));
    assert_eq!(json(&ran.out)["run"]["state"], "cancelled");
    let late = bench.run(&["wait", "3f2a0", "--timeout", "0.05"]).await;
    assert_eq!(late.code, 6);
    assert!(late.err.contains("is not over after 0.05 s"), "{}", late.err);
    let ran = bench.run(&["wait", "old"]).await;
    assert_eq!(ran.code, 0);
    assert!(ran.out.starts_with("old (aa0000000001) succeeded: 120 steps"), "{}", ran.out);
}

#[tokio::test]
async fn nothing_to_watch() {
    let bench = Bench::new(World { runs: vec![succeeded()], ..World::default() }).await;
    assert_eq!(bench.run(&["watch"]).await.code, 8);
    let bench = Bench::new(World { active: None, ..world() }).await;
    let ran = bench.run(&["watch"]).await;
    assert_eq!(ran.code, 4);
    assert!(ran.err.starts_with("error: no run has the device, and 2 runs are not over\n"), "{}", ran.err);
}

#[tokio::test]
async fn submit() {
    let bench = Bench::new(world()).await;
    let directory = bench.directory().join("specs");
    fs::create_dir_all(directory.join("base")).unwrap();
    fs::write(directory.join("rows.jsonl"), "rows").unwrap();
    let text = "[model]\nbase = 'base'\n[data]\ntrain = 'rows.jsonl'\n";
    let spec = directory.join("night.toml");
    fs::write(&spec, text).unwrap();
    let spec = spec.to_str().unwrap();
    let ran = bench.run(&["submit", spec, "--priority", "-3", "--hold"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "3f2a91c04d7e\n"));
    assert_eq!(ran.err, "submitted night (3f2a91c04d7e); watch it with: finetunectl watch 3f2a91c04d7e\n");
    {
        let mut world = bench.shared.world();
        let submitted: std::collections::HashMap<String, String> = world.submitted.drain(..).collect();
        let expected = [("spec", text), ("rows.jsonl", "rows"), ("base", "")];
        assert_eq!(submitted, expected.map(|(name, text)| (name.to_string(), text.to_string())).into());
        assert_eq!(world.calls.pop().unwrap(), "Submit hold=true priority=-3 spec-name=night.toml");
    }
    let object = json(&bench.run(&["submit", spec, "--json"]).await.out);
    assert_eq!(object["run"].to_string(), NIGHT);
    let end = async {
        bench.looked_at().await;
        bench.change(|run| run.state = "succeeded".into()).await;
    };
    let words = ["submit", spec, "--wait", "--json"];
    let (ran, ()) = tokio::join!(bench.run(&words), end);
    assert_eq!((ran.code, json(&ran.out)["run"]["state"].as_str()), (0, Some("succeeded")));
    // A mistake is found here: the daemon is not asked.
    let before = bench.shared.world().calls.len();
    let ran = bench.run(&["submit", spec, "--set", "train.max_stpes=3"]).await;
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.starts_with("error: --set train.max_stpes=3: train.max_stpes: unknown key"),
        "{}",
        ran.err
    );
    assert_eq!(bench.shared.world().calls.len(), before);
}

#[tokio::test]
async fn inhibit() {
    let bench = Bench::new(world()).await;
    let ran = bench.run(&["inhibit", "--why", "docking", "--", "sh", "-c", "exit 9"]).await;
    assert_eq!(ran, Ran { code: 9, out: String::new(), err: String::new() });
    assert_eq!(bench.shared.world().calls, ["Inhibit run sh docking"]);
    // The hold has ended: every copy of its descriptor is closed.
    let mut hold = bench.shared.world().holds.pop().unwrap();
    assert_eq!(hold.read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.run(&["inhibit", "--why", "x", "--", "/no/such/program"]).await.code, 127);
    // Ctrl-C is for the command, which may want to live on.
    let interrupt = async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        bench.interrupt.notify_one();
    };
    let words = ["inhibit", "--why", "x", "--", "sh", "-c", "sleep 0.2; exit 4"];
    let (ran, ()) = tokio::join!(bench.run(&words), interrupt);
    assert_eq!(ran.code, 4);
    bench.interrupt.notify_one();
    let ran = bench.run(&["inhibit", "--why", "x", "--who", "me"]).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, "training is held; Ctrl-C lets it go on\n"));
    assert_eq!(bench.shared.world().calls.last().unwrap(), "Inhibit run me x");
}

#[tokio::test]
async fn models() {
    let bench = Bench::new(World { models: vec![("qwen3", 3 << 30), ("tiny", 512)], ..world() }).await;
    assert_eq!(
        clean(bench.run(&["model", "list"]).await),
        "\
NAME   ARCHITECTURE      SIZE     DIRECTORY
qwen3  LlamaForCausalLM  3.0 GiB  /models/qwen3
tiny   LlamaForCausalLM  512 B    /models/tiny
"
    );
    assert_eq!(
        clean(bench.run(&["model", "list", "--json"]).await)
            .lines()
            .next()
            .unwrap()
            .replace("},{", "},\n{")
            .lines()
            .last(),
        Some(r#"{"name":"tiny","directory":"/models/tiny","bytes":512,"architecture":"LlamaForCausalLM"}]}"#)
    );
    let directory = bench.directory().to_str().unwrap();
    assert_eq!(clean(bench.run(&["model", "add", "new", directory]).await), "new: added\n");
    assert_eq!(
        clean(bench.run(&["model", "remove", "new", "--json"]).await),
        "{\"schema\":1,\"name\":\"new\",\"removed\":true}\n"
    );
    assert_eq!(bench.shared.world().calls, ["AddModel new", "RemoveModel new"]);
    assert_eq!(bench.run(&["model", "add", "new", "/no/such"]).await.code, 2);
}

#[tokio::test]
async fn adapters() {
    let bench = Bench::new(world()).await;
    assert_eq!(
        clean(bench.run(&["adapter", "list"]).await),
        "ID     NAME  STEPS  EVAL    AGE\naa000  old   120    0.7500  2 d\n"
    );
    assert_eq!(
        clean(bench.run(&["adapter", "list", "--json"]).await),
        "{\"schema\":1,\"adapters\":[{\"run\":\"aa0000000001\",\"name\":\"old\",\"step\":120,\"eval_loss\":0.75,\
         \"finished_us\":1699826000000000}]}\n"
    );
    let target = bench.directory().join("out");
    let target = target.to_str().unwrap();
    let out = clean(bench.run(&["adapter", "export", "old", target]).await);
    assert_eq!(out, format!("old (aa0000000001): {target}, 2 files, 9 B\n"));
    assert_eq!(fs::read_to_string(format!("{target}/adapter_model.safetensors")).unwrap(), "weights");
    assert_eq!(bench.run(&["adapter", "export", "old", target]).await.code, 1);
    let object = json(&clean(bench.run(&["adapter", "export", "old", target, "--force", "--json"]).await));
    assert_eq!(
        object["files"].to_string(),
        r#"[{"name":"adapter_config.json","bytes":2},{"name":"adapter_model.safetensors","bytes":7}]"#
    );
}

#[tokio::test]
async fn doctor() {
    let bench = Bench::new(world()).await;
    let ran = bench.run(&["doctor", "--json"]).await;
    let object = json(&ran.out);
    let checks = object["checks"].as_array().unwrap();
    let verdict = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap()["verdict"].clone();
    assert_eq!(
        (verdict("bus"), verdict("daemon"), verdict("system")),
        ("ok".into(), "ok".into(), "ok".into())
    );
    let failed = checks.iter().any(|check| check["verdict"] == "fail");
    assert_eq!(ran.code, u8::from(failed));
    let text = bench.run(&["doctor"]).await.out;
    assert!(text.starts_with("ok    bus         a socket pair\nok    daemon      version 0.1.0"), "{text}");
    bench.hang_up().await;
    let ran = bench.run(&["doctor"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.out.contains("fail  daemon"), "{}", ran.out);
}

/// The facts of a machine are found where a Jetson has them.
#[tokio::test]
async fn doctor_on_a_jetson() {
    let bench = Bench::new(world()).await;
    let write = |path: &str, text: &str| {
        let path = bench.directory().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("proc/device-tree/compatible", "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0");
    write("proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0");
    write("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1\n");
    write("proc/meminfo", "MemTotal: 64 kB\nMemAvailable:   1048576 kB\n");
    for node in ["dev/nvmap", "dev/nvgpu/igpu0/ctrl", "dev/host1x-fence"] {
        write(node, "");
    }
    let object = json(&bench.run(&["doctor", "--json"]).await.out);
    let message = |name: &str| {
        let check = object["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap();
        format!("{} {}", check["verdict"].as_str().unwrap(), check["message"].as_str().unwrap())
    };
    assert_eq!(message("board"), "ok NVIDIA Jetson AGX Orin Developer Kit, R36 (release), REVISION: 4.3");
    assert_eq!(message("nodes"), "fail missing: /dev/dri/renderD128");
    assert_eq!(message("cuda"), "fail libcuda.so.1 is not there");
    assert_eq!(message("memory"), "warn 1.0 GiB available");
    write("etc/ld.so.cache", "glibc-ld.so.cache1.1 libc.so.6 libcuda.so.1 /usr/lib");
    let object = bench.run(&["doctor"]).await.out;
    assert!(object.contains("ok    cuda"), "{object}");
}

/// The definition of the command line has no contradiction, and its help names every exit code.
#[test]
fn the_command_line_is_sound() {
    use clap::CommandFactory;
    let mut command = super::Arguments::command();
    command.clone().debug_assert();
    let help = command.render_long_help().to_string();
    assert!(help.contains("130  interrupted"), "{help}");
    let page = include_str!("../../docs/finetunectl.md");
    for verb in command.get_subcommands() {
        assert!(
            page.contains(&format!("`{}", verb.get_name())),
            "{} is not in docs/finetunectl.md",
            verb.get_name()
        );
    }
}

/// Two hours in which it was first too warm, then leased; the second hour lies outside the window.
fn night() -> String {
    use crate::night::figures::{Lease, ModeSeen, NoteSeen, Point, RunNight, Spread};
    use crate::night::{Figures, Record, Report, SECOND, Segment, Span, Use};
    use crate::reason::Reason;
    use crate::units::{Joules, RunId};
    let from = 1_699_876_800 * SECOND; // 12:00 on 13 November
    let at = |minutes: i64| from + 60 * SECOND * minutes;
    let span = |begin: i64, end: i64| Span { from: at(begin), to: at(end) };
    let mut record = Record::new("2023-11-13".parse().unwrap(), span(0, 1440), "UTC".into());
    record.set_windows(&[span(600, 660)], from);
    let lost = |begin, end, reason| Segment::whole(span(begin, end), Use::Lost(reason));
    for segment in [
        lost(0, 600, Reason::OutsideWindow),
        Segment::whole(span(600, 602), Use::Preparing),
        Segment::shared(span(602, 642), Use::Training, 0.75, Use::Lost(Reason::Thermal)),
        lost(642, 652, Reason::Leased),
        Segment::whole(span(652, 660), Use::Training),
        lost(660, 1440, Reason::OutsideWindow),
    ] {
        record.put(segment, Reason::Off);
    }
    let mut hottest = Spread::default();
    (70..=86).for_each(|celsius| hottest.add(f64::from(celsius), 60.0));
    record.figures = Figures {
        steps: 120,
        tokens: 245_760,
        paced_us: 100,
        computed_us: 79,
        hottest,
        power: hottest,
        gross: true,
        starts: 2,
        ..Figures::default()
    };
    record.figures.energy.gross = Joules(54_000.0);
    record.figures.energy.idle = Joules(18_000.0);
    record.figures.energy.metered = 2280.0;
    record.figures.zones.insert("tj-thermal".into(), 86.25);
    let run = RunNight {
        name: "day\x1b[31m".into(),
        first_step: 40,
        last_step: 160,
        first_loss: Some(1.5),
        last_loss: Some(1.25),
        state: "waiting".into(),
        reason: Some("outside-window".into()),
        energy: record.figures.energy,
    };
    record.figures.runs.insert(RunId::parse("3f2a91c04d7e").unwrap(), run);
    record.figures.leases.insert("planner".into(), Lease { count: 3, time: 600 * SECOND });
    record.figures.modes.push(ModeSeen { at: at(0), mode: "MODE_30W".into() });
    let text = "the kernel throttles".to_string();
    record.figures.notes.push(NoteSeen { text, first: at(620), seconds: 90.0 });
    record.points.push(Point { at: at(605), power: Some(24.5), ..Point::default() });
    serde_json::to_string(&Report::new(&record, true)).unwrap()
}

const NIGHT_TEXT: &str = "\
● The night of 2023-11-13
  Trained 38 min 0 s of the 1 h 0 min window (63.3 %); waited 10 min 0 s because of leased, 10 min 0 s because of thermal; 2 min 0 s preparing.
  leased: `finetunectl status` shows who holds the device; the leases of the night are listed with who had them
  thermal: more air, a lower power mode (nvpmodel), or a higher [budget] temperature: more of the time, or faster in it

  22:00 cc▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇aaaaaaaaaa████████ 23:00

    WHAT       TIME        SHARE
  █ training   38 min 0 s  63.3 %  a run trained
  a leased     10 min 0 s  16.7 %  an inference task has the device
  b thermal    10 min 0 s  16.7 %  it is too warm: it goes on when it has cooled
  c preparing  2 min 0 s   3.3 %   a run read its data and loaded its base

  The whole night, noon to noon:
    WHAT            TIME        SHARE
  · outside-window  23 h 0 min  95.8 %  it is not the time for training: see `[window]`
  █ training        38 min 0 s  2.6 %   a run trained
  a leased          10 min 0 s  0.7 %   an inference task has the device
  b thermal         10 min 0 s  0.7 %   it is too warm: it goes on when it has cooled
  c preparing       2 min 0 s   0.1 %   a run read its data and loaded its base

              Done: 120 steps, 245760 tokens
              Duty: 79 % of the time in which a run could train
            Energy: 15.0 Wh of runs, 10.0 Wh above idle, 0.220 J a token, 450 J a step
             Power: 70.0 to 86.0 W, mean 78.0 W
      Hottest zone: 70.0 to 86.0 °C, mean 78.0 °C
  Greatest of each: tj-thermal 86.2 °C
        Power mode: MODE_30W from 12:00
             Noted: the kernel throttles, for 1 min 30 s from 22:20
            Record: The daemon was started 2 times.

  RUN            ID      STEPS      LOSS              ENERGY   AT LAST
  day\\u{1b}[31m  3f2a91  40 to 160  1.5000 to 1.2500  15.0 Wh  waiting (outside-window)

  LEASES AND HOLDS OF  COUNT  TIME
  planner              3      10 min 0 s
";

#[tokio::test]
async fn night_as_text_json_and_page() {
    let nights = vec![("", night()), ("last", night()), ("now", "{\"schema\":1,\"new\":{}}".into())];
    let bench = Bench::new(World { nights, ..World::default() }).await;
    assert_eq!(clean(bench.run(&["night"]).await), NIGHT_TEXT);
    assert_eq!(clean(bench.run(&["night", "--date", "last"]).await), NIGHT_TEXT);
    // What a daemon of another version does not say is left out.
    assert!(clean(bench.run(&["night", "--date", "today"]).await).starts_with("● The night of"));
    let report = json(&clean(bench.run(&["night", "--json"]).await));
    assert_eq!((&report["night"], &report["steps"]), (&"2023-11-13".into(), &120.into()));
    assert_eq!(
        report["window"]["uses"][0].to_string(),
        r#"{"what":"training","seconds":2280.0,"share":0.6333333333333333}"#
    );
    assert_eq!(report["intervals"][2]["uses"].to_string(), r#"{"thermal":600.0,"training":1800.0}"#);
    let nobody = bench.run(&["night", "--date", "2023-11-01"]).await;
    assert_eq!(nobody.code, 4);
    assert!(
        nobody.err.contains("no record of the night 2023-11-01") && nobody.err.contains("--list"),
        "{}",
        nobody.err
    );
    assert_eq!(clean(bench.run(&["night", "--list"]).await), "2023-11-12\n2023-11-13\n");
    assert_eq!(json(&clean(bench.run(&["night", "--list", "--json"]).await))["nights"][1], "2023-11-13");
    let file = bench.directory().join("night.html");
    clean(bench.run(&["night", "--html", file.to_str().unwrap()]).await);
    let page = clean(bench.run(&["night", "--html", "-"]).await);
    assert_eq!(fs::read_to_string(&file).unwrap(), page);
    assert!(page.contains("Trained 38 min 0 s") && !page.contains('\x1b'));
    let refused = bench.run(&["night", "--html", "/nowhere/night.html"]).await;
    assert!(refused.code == 1 && refused.err.contains("/nowhere/night.html"), "{}", refused.err);
}
