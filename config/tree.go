package config

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// place is where something stands.
type place struct {
	file         string
	line, column int
}

type kind int

const (
	null kind = iota
	boolean
	integer
	float
	text
	list
	mapping
)

// node is a value of a declaration: YAML and JSON without what makes them differ.
type node struct {
	place
	kind    kind
	text    string  // a scalar as it was written; a text's value
	value   any     // bool, int64, uint64 or float64
	items   []*node // of a list
	entries []entry // of a mapping, in their order
}

type entry struct {
	key   string
	place place
	value *node
}

func (n *node) get(key string) *node {
	for _, e := range n.entries {
		if e.key == key {
			return e.value
		}
	}
	return nil
}

// readTree parses one document. It refuses what a declaration has no use for and an attacker has (anchors, aliases, tags, deep
// nesting, a great number of values) before any of it is built.
func readTree(file string, data []byte) (*node, Problems) {
	r := treeReader{file: file}
	data, ok := r.checkBytes(data)
	if !ok {
		return nil, r.problems
	}
	tokens := lexer.Tokenize(string(data))
	if !r.checkTokens(tokens) {
		return nil, r.problems
	}
	parsed, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // duplicates are reported here, all of them
	if err != nil {
		r.syntax(err)
		return nil, r.problems
	}
	var root *node
	for i, doc := range parsed.Docs {
		if i > 0 {
			r.fail(r.at(doc.Start), "", "a second document starts here", "one document, that is one VM, per file")
			return nil, r.problems
		}
		if doc.Body != nil {
			root = r.node(doc.Body, "", 0)
		}
	}
	if len(r.problems) > 0 {
		return nil, r.problems
	}
	if root == nil || root.kind == null {
		return &node{kind: mapping, place: place{file, 1, 1}}, nil
	}
	return root, nil
}

type treeReader struct {
	file     string
	problems Problems
}

func (r *treeReader) fail(at place, field, wrong, want string) {
	r.problems = append(r.problems, Problem{File: r.file, Line: at.line, Column: at.column, Field: field, Wrong: wrong, Want: want})
}

func (r *treeReader) at(tk *token.Token) place {
	if tk == nil || tk.Position == nil {
		return place{file: r.file, line: 1, column: 1}
	}
	return place{r.file, tk.Position.Line, tk.Position.Column}
}

// checkBytes looks at size, encoding and control characters, and drops a byte order mark.
func (r *treeReader) checkBytes(data []byte) ([]byte, bool) {
	if len(data) > maxFile {
		r.problems = append(r.problems, tooLarge(r.file))
		return nil, false
	}
	if len(data) >= 3 && string(data[:3]) == "\ufeff" {
		data = data[3:]
	}
	line, column := 1, 1
	for i := 0; i < len(data); {
		c, width := utf8.DecodeRune(data[i:])
		switch {
		case c == utf8.RuneError && width == 1:
			r.fail(place{line: line, column: column}, "", fmt.Sprintf("the byte 0x%02x isn't UTF-8", data[i]), "text in UTF-8")
			return nil, false
		case c == '\r' && i+1 < len(data) && data[i+1] == '\n', c == '\t', c == '\n':
		case c < ' ' || c >= 0x7f && c < 0xa0:
			r.fail(place{line: line, column: column}, "", fmt.Sprintf("there is a control character, %U", c), `text; in quotes, \x and two hex digits`)
			return nil, false
		}
		i, column = i+width, column+1
		if c == '\n' {
			line, column = line+1, 1
		}
	}
	return data, true
}

func (r *treeReader) checkTokens(tokens token.Tokens) bool {
	values := 0
	refused := map[string]bool{} // each once: thousands of them say no more
	refuse := func(tk *token.Token, wrong, want string) {
		if !refused[wrong] {
			refused[wrong] = true
			r.fail(r.at(tk), "", wrong, want)
		}
	}
	for _, tk := range tokens {
		switch tk.Type {
		case token.CommentType:
			continue
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			refuse(tk, "anchors, aliases and merge keys aren't read", "the value itself, or `defaults:` in the host's file; a text that starts with & or * in quotes")
		case token.TagType:
			refuse(tk, "tags aren't read", "the value itself; a text that starts with ! in quotes")
		case token.DirectiveType:
			refuse(tk, "directives aren't read", "the declaration alone; a text that starts with % in quotes")
		}
		if values++; values > maxTokens {
			r.fail(r.at(tk), "", fmt.Sprintf("has more than %d values and signs", maxTokens), "a declaration, which has some 100")
			return false
		}
	}
	return len(r.problems) == 0
}

func (r *treeReader) syntax(err error) {
	var positioned interface {
		GetToken() *token.Token
		GetMessage() string
	}
	if errors.As(err, &positioned) {
		r.fail(r.at(positioned.GetToken()), "", "isn't YAML or JSON: "+escaped(positioned.GetMessage()), "")
		return
	}
	r.fail(place{line: 1, column: 1}, "", "isn't YAML or JSON: "+escaped(err.Error()), "")
}

// escaped is a message of the parser's, which repeats what it stumbled over, as one line that drives no terminal.
func escaped(message string) string {
	if q := strconv.QuoteToGraphic(message); unprintable(message) {
		return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
	}
	return message
}

// exponent is a number that JSON knows and the YAML parser takes for text.
var exponent = regexp.MustCompile(`^-?[0-9]+(\.[0-9]+)?[eE][+-]?[0-9]+$`)

func (r *treeReader) node(in ast.Node, path string, depth int) *node {
	out := &node{place: r.at(in.GetToken())}
	if depth > maxDepth {
		r.fail(out.place, "", fmt.Sprintf("is nested more than %d levels deep", maxDepth), "a declaration, which has 5")
		return out
	}
	if tk := in.GetToken(); tk != nil {
		out.text = tk.Value
	}
	switch in := in.(type) {
	case *ast.NullNode:
		out.kind = null
	case *ast.BoolNode:
		out.kind, out.value = boolean, in.Value
	case *ast.IntegerNode:
		out.kind, out.value = integer, in.Value
		if u, ok := in.Value.(uint64); ok && u <= math.MaxInt64 {
			out.value = int64(u)
		}
	case *ast.FloatNode:
		out.kind, out.value = float, in.Value
		if math.IsInf(in.Value, 0) || math.IsNaN(in.Value) {
			r.fail(out.place, path, out.text+" is too large a number", "a number that JSON can hold")
		}
	case *ast.InfinityNode, *ast.NanNode:
		r.fail(out.place, path, out.text+" isn't a number that JSON can hold", "a number")
	case *ast.StringNode:
		out.kind, out.text = text, in.Value
		if in.Token != nil && in.Token.Type == token.StringType && exponent.MatchString(in.Value) {
			if f, err := strconv.ParseFloat(in.Value, 64); err == nil {
				out.kind, out.value = float, f
			}
		}
	case *ast.LiteralNode:
		out.kind, out.text = text, in.Value.Value
	case *ast.SequenceNode:
		out.kind = list
		for i, item := range in.Values {
			out.items = append(out.items, r.node(item, fmt.Sprintf("%s[%d]", path, i), depth+1))
		}
	case *ast.MappingNode:
		out.kind = mapping
		r.mapping(out, in.Values, path, depth)
		if !in.IsFlowStyle && len(out.entries) > 0 {
			out.place = out.entries[0].place
		}
	case *ast.MappingValueNode:
		out.kind = mapping
		r.mapping(out, []*ast.MappingValueNode{in}, path, depth)
		if len(out.entries) > 0 {
			out.place = out.entries[0].place
		}
	default:
		r.fail(out.place, path, fmt.Sprintf("a YAML %s isn't read here", in.Type()), "text, a number, a list or a mapping")
	}
	return out
}

func (r *treeReader) mapping(out *node, values []*ast.MappingValueNode, path string, depth int) {
	first := map[string]place{}
	for _, pair := range values {
		in := ast.Node(pair.Key)
		if explicit, ok := in.(*ast.MappingKeyNode); ok {
			in = explicit.Value
		}
		var key *node
		if in != nil {
			key = r.node(in, path, depth)
		}
		if key == nil || key.kind != text && key.kind != integer {
			r.fail(r.at(pair.Key.GetToken()), path, "has a key that isn't text", "the key in quotes")
			continue
		}
		where := join(path, key.text)
		if before, ok := first[key.text]; ok {
			r.fail(key.place, where, fmt.Sprintf("is declared a second time, after line %d", before.line), "it once")
			continue
		}
		first[key.text] = key.place
		e := entry{key: key.text, place: key.place, value: &node{kind: null}}
		if pair.Value != nil {
			e.value = r.node(pair.Value, where, depth+1)
		}
		if e.value.kind == null {
			e.value.place = key.place
		}
		out.entries = append(out.entries, e)
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}
