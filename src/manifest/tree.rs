//! YAML (and so JSON) with its place in the text: [`Stream`] is what is written, [`Tree`] is what it means once
//! aliases and merge keys are followed.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    ops::Range,
};

use granit_parser::{Event, Marker, Parser, ScalarStyle, StructureStyle, options};
use serde::de::IgnoredAny;
use serde_json::Value;

use super::{Error, scalar};

/// How deep collections may nest, aliases followed.
const MAX_DEPTH: usize = 100;
/// How many nodes of one document may come from aliases.
const MAX_ALIASED: usize = 100_000;
const TOO_DEEP: &str = "nested too deeply";
/// The byte order mark, which is no part of any document.
const BOM: char = '\u{feff}';

/// The documents of a text as they are written.
pub(super) struct Stream {
    pub(super) nodes: Vec<Node>,
    /// One node for each document; that of an empty document is an empty scalar.
    pub(super) roots: Vec<usize>,
}

/// A node as it is written.
pub(super) struct Node {
    /// Its bytes, without anchor and tag. A block scalar reaches from its header to its last visible character, a
    /// block collection to the end of its last node.
    pub(super) span: Range<usize>,
    pub(super) line: usize,
    /// In characters, from 1.
    pub(super) column: usize,
    pub(super) content: Content,
}

/// What a node holds; other nodes by their index in [`Stream::nodes`].
pub(super) enum Content {
    /// `merge` says that it is `<<`, which merges if it is a key.
    Scalar {
        value: Value,
        style: ScalarStyle,
        merge: bool,
    },
    Sequence(Vec<usize>),
    Mapping {
        flow: bool,
        pairs: Vec<(usize, usize)>,
    },
    Alias(usize),
}

/// A document with aliases and merge keys followed.
pub(super) enum Tree<'a> {
    Leaf(Leaf<'a>),
    List(Vec<Tree<'a>>),
    Map(Vec<Entry<'a>>),
}

/// An entry of a mapping.
pub(super) struct Entry<'a> {
    pub(super) key: Cow<'a, str>,
    key_node: usize,
    pub(super) tree: Tree<'a>,
}

/// A scalar in one of the places where the document has it.
pub(super) struct Leaf<'a> {
    /// Counts the leaves of a document.
    pub(super) number: usize,
    pub(super) value: &'a Value,
    /// Where the text can change this leaf: the scalar itself, then what leads to it from farther away.
    pub(super) sites: Vec<Site>,
}

/// A place in the text that decides the value of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Site {
    /// The scalar.
    Scalar(usize),
    /// An alias of the scalar.
    Alias(usize),
    /// The mapping that gets the scalar, under this key, from a merge key.
    Merge { mapping: usize, key: usize },
}

impl Stream {
    /// Reads every document of `text`.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let mut builder = Builder { nodes: Vec::new(), roots: Vec::new(), open: Vec::new(), base: (0, 0, 0) };
        let mut start = text.len() - text.trim_start_matches(BOM).len();
        let json_ends = json_ends(text, start);
        for &end in json_ends.as_ref().unwrap_or(&vec![text.len()]) {
            let piece = text.get(start..end).unwrap_or_default();
            builder.base.0 = start;
            builder.read(piece, json_ends.is_some())?;
            let lines = piece.matches('\n').count();
            let last = piece.rsplit('\n').next().unwrap_or_default().chars().count();
            builder.base.1 += lines;
            builder.base.2 = if lines > 0 { last } else { builder.base.2 + last };
            start = end;
        }
        Ok(Self { nodes: builder.nodes, roots: builder.roots })
    }

    /// Follows the aliases and merge keys of the document at `root`.
    pub(super) fn expand(&self, root: usize) -> Result<Tree<'_>, Error> {
        Expander { stream: self, leaves: 0, aliased: 0, aliases: 0, depth: 0 }.tree(root)
    }

    /// An error at a node.
    pub(super) fn error(&self, node: usize, message: impl Into<String>) -> Error {
        error(&self.nodes, node, message)
    }

    /// The text of a mapping key.
    pub(super) fn key(&self, node: usize) -> Option<Cow<'_, str>> {
        key(&self.nodes, node)
    }

    /// What a node holds.
    pub(super) fn content(&self, node: usize) -> Option<&Content> {
        self.nodes.get(node).map(|node| &node.content)
    }

    /// Whether a mapping key merges.
    pub(super) fn is_merge(&self, key: usize) -> bool {
        matches!(self.content(key), Some(Content::Scalar { merge: true, .. }))
    }
}

impl Tree<'_> {
    /// The value under a key of a mapping.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Map(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.tree),
            _ => None,
        }
    }

    /// The items of a sequence; none if it is something else.
    pub(super) fn items(&self) -> &[Self] {
        if let Self::List(items) = self { items } else { &[] }
    }

    /// The text of a string.
    pub(super) fn text(&self) -> Option<&str> {
        if let Self::Leaf(leaf) = self { leaf.value.as_str() } else { None }
    }

    /// The content, with the leaves in `changed`, by their numbers, replaced.
    pub(super) fn value(&self, changed: &HashMap<usize, String>) -> Value {
        match self {
            Self::Leaf(leaf) => match changed.get(&leaf.number) {
                Some(new) => Value::String(new.clone()),
                None => leaf.value.clone(),
            },
            Self::List(items) => items.iter().map(|item| item.value(changed)).collect(),
            Self::Map(entries) => Value::Object(
                entries
                    .iter()
                    .map(|entry| (entry.key.clone().into_owned(), entry.tree.value(changed)))
                    .collect(),
            ),
        }
    }

    /// Collects the leaves.
    pub(super) fn leaves<'t>(&'t self, leaves: &mut Vec<&'t Leaf<'t>>) {
        match self {
            Self::Leaf(leaf) => leaves.push(leaf),
            Self::List(items) => items.iter().for_each(|item| item.leaves(leaves)),
            Self::Map(entries) => entries.iter().for_each(|entry| entry.tree.leaves(leaves)),
        }
    }

    fn reached_from(&mut self, site: Site) {
        if let Self::Leaf(leaf) = self {
            leaf.sites.push(site);
        }
    }
}

impl Site {
    /// The node that an edit of the site changes.
    pub(super) fn node(self) -> usize {
        match self {
            Self::Scalar(node) | Self::Alias(node) | Self::Merge { mapping: node, .. } => node,
        }
    }
}

/// Makes nodes of the parser's events.
struct Builder {
    nodes: Vec<Node>,
    roots: Vec<usize>,
    open: Vec<Open>,
    /// The bytes, lines, and columns in the last of these lines, before what the parser is given.
    base: (usize, usize, usize),
}

/// A collection whose end has not been seen.
struct Open {
    node: usize,
    anchor: usize,
    key: Option<usize>,
    keys: HashSet<String>,
}

impl Builder {
    /// Reads YAML, or a JSON document. The latter is YAML too, but for characters that YAML does not allow in strings;
    /// so the parser is given others of the same length, and decides only where things are.
    fn read(&mut self, text: &str, json: bool) -> Result<(), Error> {
        let stand_in = |c: char| match c.len_utf8() {
            1 if c != '\u{7f}' => c,
            1 => 'x',
            2 => '\u{e9}',
            3 => '\u{4e00}',
            _ => '\u{20000}',
        };
        let yaml = if json { Cow::Owned(text.chars().map(stand_in).collect()) } else { Cow::Borrowed(text) };
        let mut anchors = HashMap::new();
        let mut previous = 0;
        let options = options! { emit_comments: false, simple_key_max_lookahead: 1 << 16 };
        for event in Parser::new_from_str_with_options(&yaml, options) {
            let (event, span) = event.map_err(|error| self.error(error.marker(), error.info()))?;
            let mut range = span.byte_range().unwrap_or_default();
            let end = range.end;
            let anchor = event.anchor_id().unwrap_or_default();
            let content = match event {
                Event::Scalar(_, style, ..) if json => {
                    let value = serde_json::from_str(text.get(range.clone()).unwrap_or_default());
                    let value = value.map_err(|error| self.error(&span.start, error.to_string()))?;
                    Content::Scalar { value, style, merge: false }
                }
                Event::Scalar(text, style, _, tag) => {
                    // The parser gives `~` for a scalar that is not there.
                    let text = if range.is_empty() && style == ScalarStyle::Plain { "".into() } else { text };
                    let suffix = |prefix| tag.as_ref().and_then(|tag| tag.suffix_in_namespace(prefix));
                    let core = suffix("tag:yaml.org,2002:");
                    let merge = text == "<<"
                        && if tag.is_some() {
                            core.as_deref() == Some("merge")
                        } else {
                            style == ScalarStyle::Plain
                        };
                    let tag = tag.as_ref().map(|_| core.as_deref().unwrap_or_default());
                    Content::Scalar { value: scalar::resolve(&text, style, tag), style, merge }
                }
                Event::Alias(id) => match anchors.get(&id) {
                    Some(target) => Content::Alias(*target),
                    None => return Err(self.error(&span.start, "an alias inside of what it stands for")),
                },
                Event::SequenceStart(..) => Content::Sequence(Vec::new()),
                Event::MappingStart(style, ..) => {
                    Content::Mapping { flow: style == StructureStyle::Flow, pairs: Vec::new() }
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    let Some(Open { node, anchor, .. }) = self.open.pop() else { continue };
                    anchors.insert(anchor, node);
                    // The end of a block collection is seen at what follows.
                    previous = if range.is_empty() { previous } else { end };
                    if let Some(collection) = self.nodes.get_mut(node) {
                        collection.span.end = collection.span.end.max(self.base.0 + previous);
                    }
                    self.attach(node)?;
                    continue;
                }
                _ => continue,
            };
            if matches!(content, Content::Scalar { style: ScalarStyle::Literal | ScalarStyle::Folded, .. }) {
                range = block_scalar(text, previous, range);
            }
            previous = previous.max(range.end);
            let (line, column) = self.position(&span.start);
            let span = self.base.0 + range.start..self.base.0 + range.end;
            let node = self.nodes.len();
            if matches!(content, Content::Sequence(_) | Content::Mapping { .. }) {
                if self.open.len() == MAX_DEPTH {
                    return Err(Error { line, column, message: TOO_DEEP.into() });
                }
                self.nodes.push(Node { span, line, column, content });
                self.open.push(Open { node, anchor, key: None, keys: HashSet::new() });
            } else {
                self.nodes.push(Node { span, line, column, content });
                anchors.insert(anchor, node);
                self.attach(node)?;
            }
        }
        Ok(())
    }

    fn position(&self, mark: &Marker) -> (usize, usize) {
        let before = if mark.line() == 1 { self.base.2 } else { 0 };
        (self.base.1 + mark.line(), before + mark.col() + 1)
    }

    fn error(&self, mark: &Marker, message: impl Into<String>) -> Error {
        let (line, column) = self.position(mark);
        Error { line, column, message: message.into() }
    }

    /// Puts a finished node into the collection that is open.
    fn attach(&mut self, node: usize) -> Result<(), Error> {
        let Some(open) = self.open.last_mut() else {
            self.roots.push(node);
            return Ok(());
        };
        match (self.nodes.get_mut(open.node).map(|parent| &mut parent.content), open.key.take()) {
            (Some(Content::Sequence(items)), _) => items.push(node),
            (Some(Content::Mapping { pairs, .. }), Some(key)) => pairs.push((key, node)),
            _ => {
                let Some(key) = key(&self.nodes, node) else {
                    return Err(error(
                        &self.nodes,
                        node,
                        "a mapping key has to be a string, number or boolean",
                    ));
                };
                if open.keys.contains(&*key) {
                    return Err(error(&self.nodes, node, format!("the key {key:?} is there twice")));
                }
                open.keys.insert(key.into_owned());
                open.key = Some(node);
            }
        }
        Ok(())
    }
}

/// Follows aliases and merge keys.
struct Expander<'a> {
    stream: &'a Stream,
    leaves: usize,
    aliased: usize,
    aliases: usize,
    depth: usize,
}

impl<'a> Expander<'a> {
    fn tree(&mut self, node: usize) -> Result<Tree<'a>, Error> {
        if self.depth > MAX_DEPTH {
            return Err(self.stream.error(node, TOO_DEEP));
        }
        if self.aliases > 0 {
            self.aliased += 1;
            if self.aliased > MAX_ALIASED {
                return Err(self.stream.error(node, "the document's aliases repeat too much"));
            }
        }
        self.depth += 1;
        let tree = match self.stream.content(node) {
            Some(Content::Alias(target)) => {
                self.aliases += 1;
                let mut tree = self.tree(*target)?;
                self.aliases -= 1;
                tree.reached_from(Site::Alias(node));
                tree
            }
            Some(Content::Sequence(items)) => {
                Tree::List(items.iter().map(|item| self.tree(*item)).collect::<Result<_, _>>()?)
            }
            Some(Content::Mapping { pairs, .. }) => Tree::Map(self.entries(node, pairs)?),
            Some(Content::Scalar { value, .. }) => {
                self.leaves += 1;
                Tree::Leaf(Leaf { number: self.leaves, value, sites: vec![Site::Scalar(node)] })
            }
            None => Tree::List(Vec::new()),
        };
        self.depth -= 1;
        Ok(tree)
    }

    /// The entries of a mapping: its own, then those that it gets from a merge key.
    fn entries(&mut self, mapping: usize, pairs: &'a [(usize, usize)]) -> Result<Vec<Entry<'a>>, Error> {
        let mut entries = Vec::with_capacity(pairs.len());
        let mut merge = None;
        for &(key, value) in pairs {
            if self.stream.is_merge(key) {
                merge = Some((value, entries.len()));
            } else if let Some(text) = self.stream.key(key) {
                entries.push(Entry { key: text, key_node: key, tree: self.tree(value)? });
            }
        }
        let Some((value, before)) = merge else { return Ok(entries) };
        let mut index: HashMap<_, _> =
            entries.iter().enumerate().map(|(at, it)| (it.key.clone(), at)).collect();
        let one = [value];
        let sources = match self.stream.content(value) {
            Some(Content::Sequence(items)) => items.as_slice(),
            _ => &one,
        };
        for &source in sources {
            let Tree::Map(merged) = self.tree(source)? else {
                return Err(self.stream.error(source, "only mappings can be merged by `<<`"));
            };
            let aliased = matches!(self.stream.content(source), Some(Content::Alias(_)));
            for mut entry in merged {
                if let Some(&at) = index.get(&entry.key) {
                    // Keys before `<<`: kubectl takes the merged value, as YAML 1.1 does not.
                    let none = HashMap::new();
                    if at < before
                        && entries.get(at).is_some_and(|own| own.tree.value(&none) != entry.tree.value(&none))
                    {
                        let message = format!(
                            "`<<` overrides the key {:?} for some readers only: move `<<` to the front",
                            entry.key
                        );
                        return Err(self.stream.error(source, message));
                    }
                    continue;
                }
                if aliased {
                    entry.tree.reached_from(Site::Merge { mapping, key: entry.key_node });
                }
                index.insert(entry.key.clone(), entries.len());
                entries.push(entry);
            }
        }
        Ok(entries)
    }
}

/// Where the documents of a text end if it is JSON: one document, or some one after another, which YAML does not know.
fn json_ends(text: &str, start: usize) -> Option<Vec<usize>> {
    let rest = text.get(start..).filter(|rest| rest.trim_start().starts_with(['{', '[']))?;
    let mut values = serde_json::Deserializer::from_str(rest).into_iter::<IgnoredAny>();
    let mut ends = Vec::new();
    while let Some(value) = values.next() {
        value.ok()?;
        ends.push(start + values.byte_offset());
    }
    *ends.last_mut()? = text.len();
    Some(ends)
}

/// The text of a mapping key; `None` if it is not a scalar, or null.
fn key<'n>(nodes: &'n [Node], node: usize) -> Option<Cow<'n, str>> {
    match &nodes.get(node)?.content {
        Content::Alias(target) => key(nodes, *target),
        Content::Scalar { value: Value::Null, .. } | Content::Sequence(_) | Content::Mapping { .. } => None,
        Content::Scalar { value: Value::String(text), .. } => Some(Cow::Borrowed(text)),
        Content::Scalar { value, .. } => Some(Cow::Owned(value.to_string())),
    }
}

fn error(nodes: &[Node], node: usize, message: impl Into<String>) -> Error {
    let (line, column) = nodes.get(node).map_or((1, 1), |node| (node.line, node.column));
    Error { line, column, message: message.into() }
}

/// A block scalar from its header, which the parser's span does not have, to its last visible character.
fn block_scalar(text: &str, previous: usize, span: Range<usize>) -> Range<usize> {
    let blank = [' ', '\t', '\r', '\n'];
    let before = text.get(previous..span.start).unwrap_or_default().trim_end_matches(blank);
    let line = before.rfind(['\n', '\r']).map_or(0, |at| at + 1);
    let header = before.get(line..).unwrap_or_default();
    let indicator = header
        .char_indices()
        .find(|(at, c)| {
            let apart =
                header.get(..*at).unwrap_or_default().chars().next_back().is_none_or(char::is_whitespace);
            matches!(c, '|' | '>') && apart
        })
        .map_or(span.start, |(at, _)| previous + line + at);
    let shown = text.get(..span.end).unwrap_or_default().trim_end_matches(blank).len();
    indicator..shown.max(previous + before.len())
}
