//! `#[mobula::main]`: one program, started as driver, as host, or by hand.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::spanned::Spanned;
use syn::{Error, ItemFn, Result, parse2};

/// Wraps the user's `async fn main`.
pub(crate) fn expand(arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    if !arguments.is_empty() {
        return Err(Error::new(
            arguments.span(),
            "#[mobula::main] takes no arguments",
        ));
    }
    let mut function: ItemFn = parse2(item).map_err(|error| {
        Error::new(
            error.span(),
            "#[mobula::main] stands on `async fn main(cluster: Cluster)`",
        )
    })?;
    let signature = &function.sig;
    if signature.asyncness.is_none() {
        return Err(Error::new(
            signature.fn_token.span(),
            "this main must be an `async fn`",
        ));
    }
    if !signature.generics.params.is_empty() {
        return Err(Error::new(
            signature.generics.span(),
            "a main function cannot be generic",
        ));
    }
    let pass = match signature.inputs.len() {
        0 => quote!(),
        1 => quote!(cluster),
        2 => quote!(cluster, arguments),
        _ => {
            return Err(Error::new(
                signature.inputs.span(),
                "main takes at most `cluster: Cluster, args: Vec<String>`",
            ));
        }
    };
    let name = signature.ident.clone();
    let attributes = std::mem::take(&mut function.attrs);
    let visibility = function.vis.clone();
    let inner = format_ident!("user_{name}");
    function.sig.ident = inner.clone();
    function.vis = syn::Visibility::Inherited;
    Ok(quote! {
        #(#attributes)*
        #visibility fn #name() -> ::std::process::ExitCode {
            #function

            #[allow(unused_variables)]
            ::mobula::process::run_main(|cluster, arguments| async move {
                // Which of them is asked depends on what it returns.
                #[allow(unused_imports)]
                use ::mobula::__private::{EndOfError as _, EndOfOther as _, EndOfReport as _};
                let returned = ::mobula::__private::Returned::new(#inner(#pass).await);
                (&&&returned).end()
            })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_main_that_cannot_be_run_is_refused() {
        let cases = [
            (
                quote!(
                    fn main(cluster: Cluster) {}
                ),
                "must be an `async fn`",
            ),
            (
                quote!(
                    struct Main;
                ),
                "stands on `async fn main",
            ),
            (
                quote!(
                    async fn main<T>(cluster: Cluster) {}
                ),
                "cannot be generic",
            ),
            (
                quote!(
                    async fn main(a: A, b: B, c: C) {}
                ),
                "takes at most",
            ),
        ];
        for (item, expected) in cases {
            let message = expand(TokenStream::new(), item).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert!(
            expand(
                quote!(flavor),
                quote!(
                    async fn main() {}
                )
            )
            .is_err()
        );
    }
}
