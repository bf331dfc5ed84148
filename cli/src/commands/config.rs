//! `hull config`: the settings of this node.

use hull_sandbox::host::Host;
use hull_settings::{Problems, Settings};
use serde::Serialize;
use serde_json::Value;

use crate::args::Config;
use crate::{Error, Outcome, output};

/// A setting, as JSON has it.
#[derive(Debug, Serialize)]
struct Shown {
    key: String,
    value: Value,
    /// `default`, a variable of the environment, or FILE:LINE.
    from: String,
}

pub(super) fn run(args: &Config, host: Host) -> Outcome {
    match args {
        Config::Show { json } => show(*json, host).map(|()| 0),
        Config::Check { file: None } => Ok(judge(Settings::load())),
        Config::Check { file: Some(file) } => Ok(judge(Settings::read(std::slice::from_ref(file)))),
        Config::Example => {
            print!("{}", hull_settings::example());
            Ok(0)
        }
    }
}

fn show(json: bool, host: Host) -> Result<(), Error> {
    let settings = Settings::load()?;
    let host = settings.host(host);
    let shown = settings.in_force(&host).into_iter().map(|setting| Shown {
        key: format!("{}.{}", setting.table, setting.key),
        value: setting.value,
        from: setting.origin.to_string(),
    });
    if json {
        return output::json(&shown.collect::<Vec<_>>());
    }
    let rows: Vec<_> = shown.map(|setting| vec![setting.key, setting.value.to_string(), setting.from]).collect();
    Ok(output::table(&["KEY", "VALUE", "FROM"], &rows)?)
}

/// Prints what is wrong, a line each, and returns the status.
fn judge(checked: Result<Settings, Problems>) -> u8 {
    match checked {
        Ok(_) => 0,
        Err(problems) => {
            for problem in problems.0 {
                println!("{problem}");
            }
            1
        }
    }
}
