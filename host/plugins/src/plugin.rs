//! A loaded plugin and the questions that the host asks it. Nothing that a plugin answers is believed unchecked.

use crate::config::{self, ConfigError};
use crate::error::{LoadError, PluginError, Who};
use abi_stable::std_types::{RResult, RStr, RString};
use clip_host_plugin_api::describe::{Descriptor, Kind};
use clip_host_plugin_api::encoder::InputShape;
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::ir::{DType, Fragment, IR_VERSION, Op};
use clip_host_plugin_api::optimizer::{ScalarsAnswer, ScalarsRequest};
use clip_host_plugin_api::scheduler::{ScheduleAnswer, ScheduleRequest};
use clip_host_plugin_api::shape;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A function of the plugin's table.
type Answer = extern "C" fn(RStr<'_>) -> RResult<RString, RString>;

/// A plugin whose library is loaded, for as long as the process lives.
///
/// May be shared between threads; calls into one plugin wait for each other, because the boundary allows one at a time.
pub struct Plugin {
    descriptor: Descriptor,
    who: Who,
    sha256: String,
    /// "loss clip": the name on log lines.
    name: &'static str,
    answer: Answer,
    call: Mutex<()>,
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugin").field("who", &self.who).field("sha256", &self.sha256).finish_non_exhaustive()
    }
}

impl fmt::Display for Plugin {
    /// As errors name it: "loss plugin `clip` 0.1.0 (plugins/libclip_loss_clip.so)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.who.fmt(f)
    }
}

/// The borrowed twin of [`Request`]: requests are made at every step, their settings need no copy.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Ask<'a> {
    Scalars(&'a ScalarsRequest),
    Schedule(&'a ScheduleRequest),
}

/// [`ScalarsAnswer`] as it arrives: JSON writes NaN and infinity as null.
#[derive(Deserialize)]
struct RawScalars {
    elementwise: bool,
    scalars: Vec<(String, Option<f64>)>,
}

/// [`ScheduleAnswer`] as it arrives.
#[derive(Deserialize)]
struct RawSchedule {
    lr: Option<f64>,
    #[serde(default)]
    state: serde_json::Value,
}

impl Plugin {
    /// Loads the plugin in a file; see [`crate::load::load`].
    pub fn load(file: &Path) -> Result<Plugin, LoadError> {
        crate::load::load(file)
    }

    pub(crate) fn new(descriptor: Descriptor, file: std::path::PathBuf, sha256: String, answer: Answer) -> Self {
        let who = Who { kind: descriptor.kind, id: descriptor.id.clone(), version: descriptor.version.clone(), file };
        // Leaked, as the library is: one short string for each.
        let name = Box::leak(format!("{} {}", who.kind, who.id).into_boxed_str());
        Plugin { descriptor, who, sha256, name, answer, call: Mutex::new(()) }
    }

    /// What the plugin says of itself: documentation, schema and defaults of its settings.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    pub fn kind(&self) -> Kind {
        self.who.kind
    }

    /// The name that recipes use.
    pub fn id(&self) -> &str {
        &self.who.id
    }

    /// Version of the plugin's crate.
    pub fn version(&self) -> &str {
        &self.who.version
    }

    /// The library file, as it was found.
    pub fn file(&self) -> &Path {
        &self.who.file
    }

    /// SHA-256 of the library file when it was loaded, in lower-case hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The plugin as errors name it.
    pub fn who(&self) -> &Who {
        &self.who
    }

    /// Checks a recipe's settings against the plugin's schema and writes out every default. All errors at once.
    pub fn complete(
        &self,
        config: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<serde_json::Value, Vec<ConfigError>> {
        config::complete(&self.descriptor, config)
    }

    /// Asks a loss, optimizer or encoder to build its computation, and checks it: op by op with
    /// [`shape::verify`], and its inputs and outputs against the contract of its kind.
    ///
    /// # Errors
    /// [`PluginError::Refused`] with the plugin's own words (a panic too), [`PluginError::WrongKind`] if the request is
    /// not one for its kind, [`PluginError::NewerIr`], and [`PluginError::Malformed`] for an answer against the contract.
    pub fn fragment(&self, request: &Request) -> Result<Fragment, PluginError> {
        let (what, kind) = match request {
            Request::Loss(_) => ("a loss", Kind::Loss),
            Request::Optimizer(_) => ("an update", Kind::Optimizer),
            Request::Encoder(_) => ("an encoder", Kind::Encoder),
            // These two have answers of their own type, and a host that asks so for a fragment gets none.
            Request::Scalars(request) => {
                return Err(self.malformed("scalars", "a fragment", format!("numbers of step {}", request.step)));
            }
            Request::Schedule(request) => {
                return Err(self.malformed(
                    "a rate",
                    "a fragment",
                    format!("a rate at step {}", request.progress.step),
                ));
            }
        };
        self.expect_kind(what, kind)?;
        let text = self.ask(what, request)?;
        let fragment: Fragment = self.parse_fragment(what, &text)?;
        self.check(what, request, &fragment)?;
        Ok(fragment)
    }

    /// An optimizer's numbers of a step. Cheap: one exchange of two short texts.
    ///
    /// # Errors
    /// [`PluginError::Number`] if one is not finite; otherwise as [`Plugin::fragment`].
    pub fn scalars(&self, request: &ScalarsRequest) -> Result<ScalarsAnswer, PluginError> {
        const WHAT: &str = "scalars";
        self.expect_kind(WHAT, Kind::Optimizer)?;
        let text = self.ask(WHAT, &Ask::Scalars(request))?;
        let answer: RawScalars = self.parse(WHAT, "`elementwise` and a list of named numbers", &text)?;
        let finite = |(name, value): (String, Option<f64>)| match value {
            Some(value) if value.is_finite() => Ok((name, value)),
            _ => Err(PluginError::Number {
                who: Box::new(self.who.clone()),
                what: format!("the scalar `{name}` of step {} with learning rate {}", request.step, request.lr),
                expected: "a finite number",
                got: "NaN or infinity".into(),
            }),
        };
        let scalars = answer.scalars.into_iter().map(finite).collect::<Result<_, _>>()?;
        Ok(ScalarsAnswer { elementwise: answer.elementwise, scalars })
    }

    /// A scheduler's learning rate for the coming step, and what it wants to remember.
    ///
    /// # Errors
    /// [`PluginError::Number`] if the rate is not finite or below 0; otherwise as [`Plugin::fragment`].
    pub fn schedule(&self, request: &ScheduleRequest) -> Result<ScheduleAnswer, PluginError> {
        const WHAT: &str = "a learning rate";
        self.expect_kind(WHAT, Kind::Scheduler)?;
        let text = self.ask(WHAT, &Ask::Schedule(request))?;
        let answer: RawSchedule = self.parse(WHAT, "`lr` and `state`", &text)?;
        match answer.lr {
            Some(lr) if lr.is_finite() && lr >= 0.0 => Ok(ScheduleAnswer { lr, state: answer.state }),
            lr => Err(PluginError::Number {
                who: Box::new(self.who.clone()),
                what: format!("the learning rate of step {}", request.progress.step),
                expected: "a finite number of at least 0",
                got: lr.map_or("NaN or infinity".into(), |lr| lr.to_string()),
            }),
        }
    }

    fn expect_kind(&self, what: &'static str, expected: Kind) -> Result<(), PluginError> {
        match self.who.kind == expected {
            true => Ok(()),
            false => Err(PluginError::WrongKind { who: Box::new(self.who.clone()), what, expected }),
        }
    }

    fn malformed(&self, what: &'static str, expected: impl Into<String>, got: impl Into<String>) -> PluginError {
        PluginError::Malformed { who: Box::new(self.who.clone()), what, expected: expected.into(), got: got.into() }
    }

    /// One call across the boundary.
    fn ask(&self, what: &'static str, request: &impl Serialize) -> Result<RString, PluginError> {
        let refused = |message: String| PluginError::Refused { who: Box::new(self.who.clone()), what, message };
        let text =
            serde_json::to_string(request).map_err(|e| refused(format!("the request could not be written: {e}")))?;
        // Guards nothing on this side, so that a panic of another holder leaves nothing half done.
        let _one_at_a_time = self.call.lock().unwrap_or_else(PoisonError::into_inner);
        match crate::load::calling(self.name, || (self.answer)(RStr::from_str(&text))) {
            RResult::ROk(answer) => Ok(answer),
            RResult::RErr(message) => Err(refused(message.into_string())),
        }
    }

    fn parse<T: DeserializeOwned>(&self, what: &'static str, expected: &str, text: &str) -> Result<T, PluginError> {
        serde_json::from_str(text).map_err(|error| {
            // serde lists every op there is after an unknown one.
            let error = error.to_string();
            let (error, _) = error.split_once(", expected one of").unwrap_or((&error, ""));
            self.malformed(what, expected, format!("{error}, in `{}`", excerpt(text)))
        })
    }

    fn parse_fragment(&self, what: &'static str, text: &str) -> Result<Fragment, PluginError> {
        #[derive(Deserialize)]
        struct Version {
            ir_version: u32,
        }
        let fragment: Result<Fragment, _> = self.parse(what, "a fragment of the IR", text);
        // A newer fragment often fails to parse, on an op that this host does not know: the version is the cause to tell.
        let got = match &fragment {
            Ok(fragment) => fragment.ir_version,
            Err(_) => serde_json::from_str(text).map_or(IR_VERSION, |version: Version| version.ir_version),
        };
        match got > IR_VERSION {
            true => Err(PluginError::NewerIr { who: Box::new(self.who.clone()), got }),
            false => fragment,
        }
    }

    /// Checks a fragment's inside, then its surface against what the request's contract names.
    fn check(&self, what: &'static str, request: &Request, fragment: &Fragment) -> Result<(), PluginError> {
        const MOST: usize = isize::MAX as usize / 8;
        for (id, node) in fragment.nodes.iter().enumerate() {
            // Before `verify`, which multiplies sizes.
            let elements = node.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size.max(1)));
            if elements.is_none_or(|n| n > MOST) {
                return Err(self.malformed(
                    what,
                    "tensors that fit in memory",
                    format!("node %{id} of shape {:?}", node.shape),
                ));
            }
        }
        shape::verify(fragment).map_err(|error| self.malformed(what, "a valid fragment", error.to_string()))?;
        let (inputs, output) = contract(request);
        for node in &fragment.nodes {
            let Op::Input { name } = &node.op else { continue };
            let scalar = matches!(request, Request::Optimizer(_)) && name.starts_with("scalar.");
            let expected = match inputs.iter().find(|input| input.0 == name) {
                Some((_, shape, dtype)) => (shape.as_slice(), *dtype),
                None if scalar => (&[][..], DType::F32),
                None => {
                    let names: Vec<&str> = inputs.iter().map(|input| input.0).collect();
                    return Err(self.malformed(what, format!("the inputs {}", names.join(", ")), format!("`{name}`")));
                }
            };
            if (node.shape.as_slice(), node.dtype) != expected {
                let (expected, got) = (typed(expected.0, expected.1), typed(&node.shape, node.dtype));
                return Err(self.malformed(what, format!("the input `{name}` to be {expected}"), got));
            }
        }
        let (name, pattern) = output;
        let Some(id) = fragment.output(name) else {
            let names: Vec<&str> = fragment.outputs.iter().map(|output| output.0.as_str()).collect();
            return Err(self.malformed(
                what,
                format!("the output `{name}`"),
                format!("outputs [{}]", names.join(", ")),
            ));
        };
        let node = &fragment.nodes[id as usize];
        let fits = pattern.len() == node.shape.len()
            && pattern.iter().zip(&node.shape).all(|(pattern, size)| pattern.is_none_or(|p| p == *size))
            && node.dtype == DType::F32;
        if !fits {
            let sizes: Vec<String> = pattern.iter().map(|size| size.map_or("n".into(), |s| s.to_string())).collect();
            let expected = format!("the output `{name}` to be [{}] f32", sizes.join(", "));
            return Err(self.malformed(what, expected, typed(&node.shape, node.dtype)));
        }
        Ok(())
    }
}

fn typed(shape: &[usize], dtype: DType) -> String {
    format!("{shape:?} {}", if dtype == DType::I32 { "i32" } else { "f32" })
}

/// The first characters of an answer, for an error.
fn excerpt(text: &str) -> String {
    const LENGTH: usize = 60;
    match text.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

type Inputs = Vec<(&'static str, Vec<usize>, DType)>;
/// Name and shape, `None` where any size will do.
type Output = (&'static str, Vec<Option<usize>>);

/// The inputs that the host feeds and the output that it reads; what `build` of each kind in the plugin API makes.
fn contract(request: &Request) -> (Inputs, Output) {
    match request {
        Request::Loss(r) => {
            let rows = || vec![r.batch, r.embed_dim];
            let inputs = vec![
                ("image_features", rows(), DType::F32),
                ("text_features", rows(), DType::F32),
                ("image_embeddings", rows(), DType::F32),
                ("text_embeddings", rows(), DType::F32),
                ("image_ids", vec![r.batch], DType::I32),
                ("text_ids", vec![r.batch], DType::I32),
                ("epoch", vec![], DType::F32),
                ("step", vec![], DType::F32),
            ];
            (inputs, ("loss", vec![]))
        }
        Request::Optimizer(r) => {
            let inputs = vec![("param", r.info.shape.clone(), DType::F32), ("grad", r.info.shape.clone(), DType::F32)];
            (inputs, ("param", r.info.shape.iter().copied().map(Some).collect()))
        }
        Request::Encoder(r) => {
            let inputs = match r.input {
                InputShape::Image { height, width } => vec![("images", vec![r.batch, 3, height, width], DType::F32)],
                InputShape::Text { length } => vec![
                    ("input_ids", vec![r.batch, length], DType::I32),
                    ("attention_mask", vec![r.batch, length], DType::F32),
                ],
            };
            (inputs, ("features", vec![Some(r.batch), None]))
        }
        Request::Scalars(_) | Request::Schedule(_) => (vec![], ("", vec![])),
    }
}
